"""Record a user's own strategy or client in a run: its class, its arguments and a digest of its source."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.config import Config
from fedlora.errors import InputError

_LONGEST = 40  # characters of an argument that is shown as it is
_ATTRIBUTES = "(attributes)"
_DEEPEST = 8


@dataclasses.dataclass(frozen=True)
class UserCode:
    """A user's own strategy or client of a run.

    Attributes
    ----------
    name : str
        Its class, or where it is imported from.
    arguments : dict of str to str
        Arguments of its class, without defaults and the config. If the class does not keep an argument as an attribute
        of the same name, the digest of all attributes is one more entry.
    source : str
        SHA-256 of the source of its class and of the functions in it.
    """

    name: str
    arguments: dict[str, str]
    source: str

    def __str__(self) -> str:
        """Identify it in one line."""
        given = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.name}({given}) {self.source[:12]}"


def describe(made: object) -> UserCode:
    """Describe a strategy, or another object that a user made."""
    kind = type(made)
    arguments, known = {}, True
    for parameter in _parameters(kind):
        value = getattr(made, parameter.name, getattr(made, f"_{parameter.name}", inspect.Parameter.empty))
        if value is inspect.Parameter.empty:
            known = False
        elif not isinstance(value, Config) and not _is_default(value, parameter.default):
            arguments[parameter.name] = _short(_text(value))
    if not known:
        kept = {key: value for key, value in vars(made).items() if not isinstance(value, Config)}
        arguments[_ATTRIBUTES] = _sha(_text(kept))[:12]
    return UserCode(f"{kind.__module__}.{kind.__qualname__}", arguments, _source_of_class(kind))


def describe_app(app: object) -> UserCode:
    """Describe a ClientApp by its functions, or ``module:attribute`` by the module's source.

    Raises
    ------
    InputError
        If there is no such module.
    """
    if not isinstance(app, str):
        kind = type(app)
        functions = _sha(_text(vars(app)) if hasattr(app, "__dict__") else "")
        return UserCode(f"{kind.__module__}.{kind.__qualname__}", {}, functions)
    module, _, _ = app.partition(":")
    try:
        there = sys.modules.get(module)
        file = there.__file__ if there else getattr(importlib.util.find_spec(module), "origin", None)
        return UserCode(app, {}, hashlib.sha256(Path(file or "").read_bytes()).hexdigest())
    except (ImportError, ValueError, AttributeError, OSError):
        remedy = "there is no such module with a source; give MODULE:ATTRIBUTE as it can be imported here"
        raise InputError("client_app", app, remedy) from None


def with_user_code(config: Config, own: Mapping[str, UserCode]) -> Config:
    """Return a config that names a user's own code in ``run.strategy`` and ``run.client_app``.

    Raises
    ------
    InputError
        If the config already names other code, as that of an earlier run may.
    """
    for key in ("strategy", "client_app"):
        said, found = getattr(config.run, key), str(own[key]) if key in own else None
        if said is not None and said != found:
            remedy = f"is not what simulate() was given, {found}" if found else _REMEDY.format(key=key)
            raise InputError(f"run.{key}", said, f"{remedy}; give that one, or remove the key")
    run = config.run.model_copy(update={key: str(code) for key, code in own.items()})
    return config.model_copy(update={"run": run})


_REMEDY = "names a user's own code, which only simulate(..., {key}=...) takes"


def _parameters(kind: type) -> list[inspect.Parameter]:
    """Return the parameters of a class, with those that its ``**kwargs`` pass on to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if base is object or "__init__" not in vars(base):
            continue
        more = False
        for parameter in list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]:
            more |= parameter.kind is inspect.Parameter.VAR_KEYWORD
            if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter)
        if not more:
            break
    return list(found.values())


def _is_default(value: Any, default: Any) -> bool:
    # Flower's strategies replace None by a function of Flower's.
    flowers = default is None and str(getattr(value, "__module__", "")).startswith("flwr.")
    return flowers or _text(value) == _text(default)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST and text.isprintable() else f"{_sha(text)[:12]}"


def _text(value: Any, depth: int = 0, above: tuple[int, ...] = ()) -> str:
    """Write a value as text that is the same in every process: no addresses, no order of sets."""
    if isinstance(value, bytes):
        return f"bytes {hashlib.sha256(value).hexdigest()}"
    if isinstance(value, bool | int | float | complex | str | Path | None):
        return repr(value)
    if depth > _DEEPEST or id(value) in above:
        return type(value).__qualname__
    inner = functools.partial(_text, depth=depth + 1, above=(*above, id(value)))
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__} {_source_of_class(value)}"
    if isinstance(value, types.FunctionType | types.MethodType):
        return inner(_parts_of_function(value))
    if isinstance(value, functools.partial):
        return inner(("partial", value.func, value.args, value.keywords))
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        return f"tensor {value.dtype} {tuple(value.shape)} {inner(raw.tobytes())}"
    if isinstance(value, np.ndarray):
        return (
            f"array {value.dtype} {value.shape} {inner(value.tolist() if value.dtype.hasobject else value.tobytes())}"
        )
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{inner(key)}: {inner(item)}" for key, item in value.items())) + "}"
    if isinstance(value, Set):
        return "{" + ", ".join(sorted(map(inner, value))) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(inner, value)) + "]"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"{kind} {inner(vars(value))}" if getattr(value, "__dict__", None) else kind


def _parts_of_function(function: Any) -> tuple[Any, ...]:
    plain = getattr(function, "__func__", function)
    cells = [cell.cell_contents for cell in plain.__closure__ or () if _is_filled(cell)]
    return (plain.__module__, plain.__qualname__, _source(plain), plain.__defaults__, plain.__kwdefaults__, cells)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _source_of_class(kind: type) -> str:
    """Return the SHA-256 of the source of a class and of its bases, without those of Flower and fedlora."""
    own = [base for base in kind.__mro__ if base.__module__.split(".")[0] not in ("flwr", "fedlora", "builtins", "abc")]
    return _sha("".join(map(_source, own or [kind])))


def _source(code: Any) -> str:
    """Return the source of a class or function, or its byte code: for lambdas, and where there is no source."""
    try:
        if getattr(code, "__name__", "") != "<lambda>":
            return inspect.getsource(code)
    except (OSError, TypeError):
        pass
    members = vars(code).values() if isinstance(code, type) else [code]
    return "".join(_byte_code(member.__code__) for member in members if hasattr(member, "__code__"))


def _byte_code(code: types.CodeType) -> str:
    constants = (_byte_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts)
    return f"{code.co_code.hex()} {code.co_names} {' '.join(constants)}"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
