"""What both halves share of a method, and the registry of all methods.

A method is a subclass of :class:`Method` with a ``name``. Those of this repository lie in ``strategies``, where every
module and package is looked through: adding a file adds a method. Those of other packages are named by entry points of
the group ``fedlora.methods``, as ``name = "package.module:Class"``.

Methods are imported when one is asked for: the config must not wait for torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, ValidationError

from fedlora.config import Config, MethodSection, unknown_key
from fedlora.errors import InputError
from fedlora.ranks import has_mixed_ranks
from fedlora.registry import AGGREGATORS, CORRECTIONS, MECHANISMS, SERVER_OPTIMIZERS
from fedlora.roles import Exchange, Roles, trained_kinds

if TYPE_CHECKING:
    from torch import nn

    from fedlora.adapters import AdaptedModel
    from fedlora.transport import Transport

BUILT_IN = "fedlora.strategies"
"""The package with the methods of this repository."""
GROUP = "fedlora.methods"
"""The entry points of methods in other packages."""
ADAPTER = "adapter"
"""The PEFT folder that most methods leave in a run folder."""
CLIENTS = "clients"
"""In it, a PEFT folder for each client that has a model of its own, by the client's number."""
BEST = "best"
"""A folder in a run folder with the same of the round that validation prefers."""


class _MixedRanks:
    """Reads from a method's options whether clients may have different ranks."""

    def __get__(self, instance: object, owner: type[Method]) -> bool:
        return "ranks" in owner.Options.model_fields


class Method:
    """Facts of a method, for the config, the command line, reports, server and clients.

    Attributes
    ----------
    name, title, paper : str
        ``method.name``, a description in one line, and the paper.
    sends : str
        What is sent in a round: numbers for an adapted layer of m outputs and n inputs at rank r.
    exact : bool
        Whether the mean of what is sent is the mean of the updates.
    mixed_ranks : bool
        Whether clients may have different ranks: whether ``ranks`` is among the options.
    dp : bool
        Whether clients may train under DP-SGD.
    quantized : bool
        Whether the frozen layers may be quantised.
    reads_single_updates : bool
        Whether the aggregate uses more than the mean of what clients send, so that noise on a sum does not protect it.
    color, marker : str
        In figures, by the names of :mod:`fedlora.figures.style`, or a color as ``#rrggbb``; chosen by the method's
        name where they are empty.
    parameterisation : str
        The adapter of every adapted layer: a name in :data:`fedlora.registry.PARAMETERISATIONS`.
    learning_rates : dict of str to float
        Default learning rate by optimizer.
    persistent : bool
        Whether an array's coordinates mean the same from round to round, so that a server optimizer's moments, or error
        feedback, may be kept. If not, :meth:`transport` may carry linear state into the new coordinates.
    client : str
        Its client half, as ``MODULE:CLASS``; "" for the common one.
    outputs : tuple of str
        Folders of the result in a run folder, with the model in the first of them: a PEFT adapter, or a whole model
        of transformers. A method with an architecture of its own registers it with transformers in its module, and
        the architecture's ``model_type`` is the method's name.
    Options : type of MethodSection
        The section ``[method]`` of a config that names this method: a subclass adds the method's own keys, each with a
        description.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    sends: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    mixed_ranks = _MixedRanks()
    dp: ClassVar[bool] = True
    quantized: ClassVar[bool] = True
    reads_single_updates: ClassVar[bool] = False
    color: ClassVar[str] = ""
    marker: ClassVar[str] = ""
    parameterisation: ClassVar[str] = "lora"
    learning_rates: ClassVar[dict[str, float]]
    persistent: ClassVar[bool] = True
    client: ClassVar[str] = ""
    outputs: ClassVar[tuple[str, ...]] = (ADAPTER,)
    Options: ClassVar[type[MethodSection]] = MethodSection

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """Say how the arrays of each kind travel in a round.

        Parameters
        ----------
        config : Config
        server_round : int
            From 1.

        Returns
        -------
        mapping of str to Role
            By kind; see :mod:`fedlora.roles`.
        """
        raise NotImplementedError

    @classmethod
    def exchanges(cls, config: Config, server_round: int) -> Sequence[Exchange]:
        """Say which exchanges a round has, one after the other; one by default, with the roles of the round.

        Each exchange starts from the global arrays that the one before made. If one of them gives no arrays, the round
        does not count: the server goes back to the arrays and states of before the round. What clients did stays done:
        the privacy that they spent, and the arrays that they keep for themselves (:attr:`~fedlora.roles.Role.home`).
        """
        return (Exchange(cls.roles(config, server_round)),)

    @classmethod
    def start_exchanges(cls, config: Config) -> Sequence[Exchange]:
        """Say by which exchanges before the first round clients help to make the start; none by default.

        Their messages are of round 0, and the sections of the first are those of all. A client trains for one step in
        each. Under DP by example, that step reads :meth:`start_examples` and has noise of its own, which
        :meth:`fedlora.privacy.calibration.PrivacyPlan.for_start` says.
        """
        return ()

    @classmethod
    def exchanges_of(cls, config: Config, server_round: int) -> Sequence[Exchange]:
        """Return the exchanges of a round, or those before the first as round 0."""
        return cls.exchanges(config, server_round) if server_round else cls.start_exchanges(config)

    @classmethod
    def transport(cls, kind: str) -> Transport | None:
        """Say how arrays of a kind are carried into the coordinates of a later round (:mod:`fedlora.transport`).

        It is asked only of a method that is not :attr:`persistent`. None, the default, says that they cannot be: what
        looks back at earlier rounds is refused, unless all kinds that clients train can be carried.
        """
        return None

    @classmethod
    def has_one_exchange(cls) -> bool:
        """Whether every round has one exchange, so that an exchange is known by its round alone."""
        return cls.exchanges.__func__ is Method.exchanges.__func__  # type: ignore[attr-defined]

    @classmethod
    def personalised(cls, config: Config) -> bool:
        """Whether each client has a model of its own, since some of its arrays stay at home; no model is global then.

        Such models are scored by their clients, and their scores are never compared with a global model's.
        """
        rounds = range(1, config.run.rounds + 1)
        exchanges = (exchange for r in rounds for exchange in cls.exchanges(config, r))
        return any(role.home for exchange in exchanges for role in exchange.roles.values())

    @classmethod
    def adapt(cls, model: nn.Module, config: Config) -> AdaptedModel:
        """Put what is trained into a frozen base model, in place."""
        from fedlora.adapters import adapt

        return adapt(model, config, cls.parameterisation)

    @classmethod
    def client_half(cls) -> Any:
        """Return the class of its client half, or None for the common one."""
        if not cls.client:
            return None
        module, _, name = cls.client.partition(":")
        return getattr(importlib.import_module(module), name)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what the method cannot do, before a run begins; nothing by default.

        Raises
        ------
        InputError
        """

    @classmethod
    def unused(cls, config: Config) -> Iterator[tuple[str, str]]:
        """Yield (keys of ``[method]``, why) that have no use in this config; they are noted where they were set."""
        yield from ()

    @classmethod
    def start_examples(cls, config: Config) -> int:
        """How many of its own examples a client's start reads, under noise that its ledger is charged for; 0: none."""
        return 0

    @classmethod
    def start_share(cls, config: Config) -> float:
        """Return the share of a client's target epsilon for such a start."""
        return 0.1

    @classmethod
    def start_reads(cls, config: Config) -> Literal["nothing", "public", "private"]:
        """Say which examples the server's start reads: none, ``data.public``, or the clients' own, without noise."""
        return "nothing"

    @classmethod
    def opt_out(cls, folder: Path, owner: str) -> Any:
        """Remove what an owner contributed from a finished run, as if it had never taken part.

        Refused by default: one client's part cannot be taken out of a mean.

        Parameters
        ----------
        folder : Path
            The run folder.
        owner : str

        Returns
        -------
        transformers.PreTrainedModel
            What is left.

        Raises
        ------
        InputError
        """
        remedy = "holds no finished run of a method that keeps owners' parts apart; give the folder of such a run"
        raise InputError("FOLDER", str(folder), remedy)


@dataclass
class _Found:
    """All methods, and what is wrong with those that cannot be used."""

    methods: dict[str, type[Method]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # entry point or module -> why
    twice: dict[str, list[str]] = field(default_factory=dict)  # name -> classes


def methods() -> dict[str, type[Method]]:
    """Return all methods by name.

    Raises
    ------
    InputError
        If two methods have one name.
    """
    found = _find()
    for name in found.twice:
        raise _taken_twice(name, found)
    return dict(sorted(found.methods.items()))


def broken_methods() -> dict[str, str]:
    """Return what could not be imported: the name of an entry point, or of a module, and why."""
    return dict(_find().broken)


@lru_cache
def get_method(name: str) -> type[Method]:
    """Return the method of a name; for built-in ones only their own module is imported.

    Raises
    ------
    InputError
        If there is no such method (close names are suggested), two methods have this name, or the entry point of this
        name cannot be imported.
    """
    likely = _built_in(name)
    if likely is not None and not entry_points(group=GROUP, name=name):
        return likely
    found = _find()
    if name in found.twice:
        raise _taken_twice(name, found)
    if name in found.methods:
        return found.methods[name]
    if name in found.broken:
        raise InputError("method.name", name, f"cannot be used: {found.broken[name]}")
    close = difflib.get_close_matches(name, found.methods, 1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(sorted(found.methods))}"
    broken = [f"{place}: {why}" for place, why in found.broken.items() if place.startswith(f"{BUILT_IN}.")]
    raise InputError("method.name", name, f"is not a method; {hint}" + "".join(f" ({text})" for text in broken))


def forget_methods() -> None:
    """Forget the methods that were found, so that a package installed since is seen."""
    _find.cache_clear()
    get_method.cache_clear()


def read_options(name: str, content: Mapping[str, Any], *, installed: bool = True) -> MethodSection:
    """Read ``[method]`` as the options of the method of that name.

    Keys of other methods are checked and left out; :attr:`MethodSection.others` says so.

    Parameters
    ----------
    name : str
    content : Mapping
        ``[method]``, with its name.
    installed : bool
        Whether the method must be one that is installed here. Else its keys may be any.

    Raises
    ------
    InputError, ValidationError
        If there is no such method or key, or a value is wrong.
    """
    try:
        options = get_method(name).Options
    except InputError:
        if installed:
            raise
        return _AnyOptions.model_validate(content)
    own = {key: value for key, value in content.items() if key in options.model_fields}
    others = {key: _owners(key, value, options, name) for key, value in content.items() if key not in own}
    section = options.model_validate(own)
    section.others.update(others)
    return section


def check_method(config: Config) -> None:
    """Refuse what the config's method cannot do.

    Raises
    ------
    InputError
    """
    method = get_method(config.method.name)
    if config.privacy.mode != "none" and not method.dp:
        raise InputError("privacy.mode", config.privacy.mode, f"{method.name} cannot train under privacy; use none")
    if config.privacy.mode != "none":
        MECHANISMS.made(config.privacy.mode).check_method(method, config)
    if config.model.quantization is not None and not method.quantized:
        remedy = f"{method.name} computes with the weights of frozen layers; leave it out, or choose another method"
        raise InputError("model.quantization", config.model.quantization, remedy)
    if config.wire.sends_updates:
        _check_updates(method, config)
    if AGGREGATORS.get(config.server.aggregator).robust:
        _check_aggregator(method, config)
    if config.server.secure_aggregation:
        _check_secure(method, config)
    if not method.persistent:
        carries = _carries(method, config)
        for field_name, value, linear, remedy in _looking_back(config):
            if carries and linear:
                continue
            why = f"looks back at earlier rounds, but {method.name} changes its coordinates in every round"
            if carries:
                why += ", into which no second moment can be carried"
            raise InputError(field_name, value, f"{why}; {remedy}")
    _check_correction(method, config)
    if config.data.validation is not None and method.personalised(config):
        remedy = (
            f"is scored on the server, but models of {method.name} are its clients' own; leave it out, and tune no key"
        )
        raise InputError("data.validation", config.data.validation, remedy)
    method.check(config)


def _check_updates(method: type[Method], config: Config) -> None:
    """Refuse updates of what the server does not hold."""
    codec = config.wire.uplink_codec or config.wire.codec
    roles = [role for exchange in method.exchanges(config, 1) for role in exchange.roles.values()]
    if any(role.made_by == "client" and role.up == "value" for role in roles):
        remedy = f"sends updates, but clients of {method.name} make a start that the server does not hold"
        raise InputError("wire.uplink_codec", codec, f"{remedy}; choose a codec of values, without error feedback")


def _check_aggregator(method: type[Method], config: Config) -> None:
    """Refuse to combine what is no mean, or is of several shapes, otherwise than by the mean."""
    name = config.server.aggregator
    if method.reads_single_updates or has_mixed_ranks(config):
        why = "mixed ranks have" if has_mixed_ranks(config) else f"{method.name} has"
        remedy = f"combines updates of one shape into one, but the aggregate of {why} another form; use mean"
        raise InputError("server.aggregator", name, remedy)


def _check_secure(method: type[Method], config: Config) -> None:
    """Refuse to hide what the method's aggregate is made of."""
    why = ""
    if method.reads_single_updates:
        why = f"hides single clients' updates, but {method.name} needs more than their mean; choose another method"
    elif has_mixed_ranks(config):
        why = "sums updates of one shape; leave method.ranks and method.device_profile out"
    elif any(role.made_by == "client" for e in method.exchanges(config, 1) for role in e.roles.values()):
        why = f"sums moves from one start, but clients of {method.name} have different starts; choose another method"
    if why:
        raise InputError("server.secure_aggregation", True, why)


def _check_correction(method: type[Method], config: Config) -> None:
    """Refuse a correction of local training where there is no mean of variates, or it would tell what is protected."""
    name = config.client.correction
    kind = CORRECTIONS.get(name)
    if not kind.active:
        return
    kind.check(config)
    roles = [role for exchange in method.exchanges(config, 1) for role in exchange.roles.values()]
    if any(role.made_by == "client" for role in roles):
        remedy = f"draws clients to their mean, but those of {method.name} start from different arrays; use none"
        raise InputError("client.correction", name, remedy)
    if has_mixed_ranks(config):
        remedy = "needs arrays of one shape; leave method.ranks and method.device_profile out, or use none"
        raise InputError("client.correction", name, remedy)
    if MECHANISMS.get(config.privacy.mode).noise_by == "server":
        remedy = f"sends variates, to which privacy.mode = {config.privacy.mode} adds no noise; use none"
        raise InputError("client.correction", name, remedy)


def _looking_back(config: Config) -> Iterator[tuple[str, Any, bool, str]]:
    """Yield what a config keeps from round to round by an array's coordinates: key, value, whether linear, remedy."""
    optimizer = SERVER_OPTIMIZERS.get(config.server.optimizer)
    if optimizer.stateful:
        yield "server.optimizer", config.server.optimizer, optimizer.linear, "use fedavg"
    if config.client.keep_optimizer_state:
        yield "client.keep_optimizer_state", True, config.client.optimizer == "sgd", "leave it out"
    if CORRECTIONS.get(config.client.correction).active:
        yield "client.correction", config.client.correction, True, "use none"
    if config.wire.keeps_errors:
        yield "wire.error_feedback", True, True, "set it to false"


def _carries(method: type[Method], config: Config) -> bool:
    """Whether all kinds that clients train can be carried into the coordinates of later rounds."""
    exchanges = [exchange for server_round in (1, 2) for exchange in method.exchanges(config, server_round)]
    return all(method.transport(kind) is not None for exchange in exchanges for kind in trained_kinds(exchange.roles))


def unused_options(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (keys of ``[method]``, why) that the config's method has no use for."""
    return get_method(config.method.name).unused(config)


class _AnyOptions(MethodSection):
    """Options of a method that is not installed."""

    model_config = ConfigDict(extra="allow")


def _owners(key: str, value: Any, options: type[MethodSection], name: str) -> str:
    """Say whose key it is, for a key that is not the method's own; the value must suit one of those that have it."""
    having = {other: method.Options for other, method in _find().methods.items() if key in method.Options.model_fields}
    if not having:
        others = sorted({known for method in _find().methods.values() for known in method.Options.model_fields})
        shown = key if key and key.isprintable() else repr(key)
        raise unknown_key(f"method.{shown}", key, value, options.model_fields, others)
    mistakes = []
    for other, section in having.items():
        try:
            section.model_validate({"name": other, key: value})
        except ValidationError as error:
            if any(mistake["loc"][:1] == (key,) for mistake in error.errors()):
                mistakes.append(error)
    if len(mistakes) == len(having):
        raise mistakes[0]
    return f"it is a key of {' and '.join(sorted(having))}, not of {name}"


def _taken_twice(name: str, found: _Found) -> InputError:
    remedy = f"is the name of two methods, {' and '.join(found.twice[name])}; rename one, or uninstall its package"
    return InputError("method.name", name, remedy)


def _place(method: type[Method]) -> str:
    return f"{method.__module__}:{method.__qualname__}"


def _defined_in(module: Any) -> Iterator[type[Method]]:
    """Yield the methods that a module defines itself: a base without a name of its own is none."""
    for value in vars(module).values():
        named = isinstance(value, type) and issubclass(value, Method) and "name" in vars(value)
        # A package may hand on what its modules define.
        if named and f"{value.__module__}.".startswith(f"{module.__name__}."):
            yield value


def has_module(name: str) -> bool:
    """Whether there is a module of a built-in method's name; its imports, which take seconds, are not made."""
    return bool(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name)) and importlib.util.find_spec(_path(name)) is not None


def _path(name: str) -> str:
    return f"{BUILT_IN}.{name.replace('-', '_')}"


def _built_in(name: str) -> type[Method] | None:
    """Look for a method in the module of its name."""
    try:
        if not has_module(name):
            return None
        module = importlib.import_module(_path(name))
    except Exception:  # _find says what is wrong
        return None
    return next((method for method in _defined_in(module) if method.name == name), None)


@lru_cache(maxsize=1)
def _find() -> _Found:
    """Import all modules that may hold methods, and sort what is found."""
    found = _Found()
    by_name: dict[str, dict[str, type[Method]]] = defaultdict(dict)
    package = importlib.import_module(BUILT_IN)
    for info in pkgutil.walk_packages(package.__path__, f"{BUILT_IN}.", onerror=lambda name: None):
        try:
            module = importlib.import_module(info.name)
        except Exception as error:
            found.broken[info.name] = _why(error)
        else:
            for method in _defined_in(module):
                by_name[method.name][_place(method)] = method
    for point in entry_points(group=GROUP):
        try:
            method = _loaded(point)
        except Exception as error:
            found.broken[point.name] = f"{point.value}: {_why(error)}"
        else:
            by_name[method.name][_place(method)] = method
    for name, classes in by_name.items():
        if len(classes) > 1:
            found.twice[name] = list(classes)
        else:
            found.methods[name] = next(iter(classes.values()))
    return found


def _loaded(point: EntryPoint) -> type[Method]:
    method = point.load()
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError("it is no subclass of fedlora.methods.Method")
    if getattr(method, "name", None) != point.name:
        raise TypeError(f"its name is {getattr(method, 'name', None)!r}, and its entry point's {point.name!r}")
    return method


def _why(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
