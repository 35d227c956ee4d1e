"""Any adapter of PEFT's in a frozen base model, with a client axis.

PEFT makes the adapters; each of its layers is then run as a function of its arrays. So one layer serves all clients of
a cohort, one after the other, and per-example gradients need no formula of their own. Nothing here knows the types by
name: what a type does is measured on small layers of drawn weights (:func:`probe`) before it enters the model.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import io
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import register_grad_sampler
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.layers import AdapterLayer, adapter_dtype
from fedlora.adapters.model import AdaptedModel, chosen_paths, never_cache, stacked_head
from fedlora.adapters.own_rows import OwnRows
from fedlora.adapters.peft_format import saved_whole, task_type, write_about
from fedlora.adapters.stacked import RowLayout, StackedLayer, StackedLinear
from fedlora.arrays import Arrays
from fedlora.config import Config, unknown_key
from fedlora.continuing import HEAD_FILE
from fedlora.errors import InputError
from fedlora.models import MeanPoolingClassifier, head_of, linear_shape, load_base, pretrained_source

TRAINED_KIND, DRAWN_KIND = "trained", "drawn"
"""Kinds of an adapter's arrays: those that PEFT trains, and those that it makes once and never trains."""

TYPE, KEYS = "method.peft_type", "method.peft"
VMAP, ROWS = "vmap", "one row at a time"
"""How per-example gradients are taken: all rows of a client by one vectorised pass, or a pass for each row."""

_OURS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
_LOADED = re.compile(r".*_(model|core|path|file|dir)")
"""Keys of code, models and files that PEFT would load. A node runs the config of a server, so no run may set them."""
FINGERPRINT = f"peft.fingerprint.{DRAWN_KIND}"
_LARGEST = 2**24
_DEFAULT = ".default"  # PEFT's name for the one adapter


# PEFT's own config.


def peft_types() -> dict[str, type[PeftConfig]]:
    """Return PEFT's types that choose modules of a model, by name; those that change the input have none."""
    found = {str(getattr(kind, "value", kind)): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {kind: made for kind, made in sorted(found.items()) if "target_modules" in _fields(made)}


def _fields(made: type[PeftConfig]) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(made) if field.init}


def _is_reserved(key: str) -> bool:
    return key in _OURS or _LOADED.fullmatch(key) is not None


def own_keys(peft_type: str) -> dict[str, Any]:
    """Return the keys of a type that ``[method.peft]`` takes, with their defaults.

    Raises
    ------
    InputError
        If PEFT has no such type, or it changes no layers.
    """
    types = peft_types()
    if peft_type not in types:
        close = difflib.get_close_matches(peft_type.upper(), types, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(types)}"
        hint = f"is no type of PEFT's that adapts chosen layers; {hint}"
        raise InputError(TYPE, peft_type, hint)
    common = {field.name for field in dataclasses.fields(PeftConfig)}
    found = {}
    for name, field in _fields(types[peft_type]).items():
        if name not in common and not _is_reserved(name):
            made = field.default_factory
            found[name] = field.default if made is dataclasses.MISSING else made()
    return found


def alpha_key(peft_type: str) -> str | None:
    """Return the type's key for alpha, of s = alpha / r; None where it has none."""
    keys = own_keys(peft_type)
    names = [name for name in ("alpha", "lora_alpha", f"{peft_type.lower()}_alpha") if keys.get(name) is not None]
    return names[0] if names and rank_key(peft_type) else None


def rank_key(peft_type: str) -> str | None:
    """Return the type's key for the rank; None where it has none, or its default does not go by one."""
    return "r" if own_keys(peft_type).get("r") else None


def peft_config(
    peft_type: str, given: Mapping[str, Any], config: Config, seed: int | None = None, **settings: Any
) -> PeftConfig:
    """Make PEFT's config from ``[method]``.

    Parameters
    ----------
    peft_type : str
    given : mapping
        ``[method.peft]``: keys of the type. They go before all else.
    config : Config
        ``method.rank`` is the type's r, and ``method.alpha`` its alpha; without it, alpha / r is that of the type's
        own defaults. Seeds are the run's.
    seed : int, optional
        Takes the place of all seeds, those that were given too.
    **settings
        What is no business of the user's: target_modules and others.

    Raises
    ------
    InputError
        For a key that the type does not have, or a value that PEFT refuses.
    """
    keys = own_keys(peft_type)
    for key, value in given.items():
        field = f"{KEYS}.{key}"
        if _is_reserved(key):
            remedy = "is not for a run to say: modules are chosen by method.target_modules, and nothing else is loaded"
            raise InputError(field, value, f"{remedy}; leave it out")
        if key not in keys:
            raise unknown_key(field, key, value, keys)
        if not _fits(value, keys[key]):
            raise InputError(field, value, f"has another type than PEFT's default {keys[key]!r}")
    seeds = [key for key in keys if key.endswith(("seed", "prng_key"))]
    values: dict[str, Any] = dict.fromkeys(seeds, config.run.seed)
    if seed is not None:
        settings |= dict.fromkeys(seeds, seed)
    rank, alpha = rank_key(peft_type), alpha_key(peft_type)
    if rank is not None:
        values[rank] = config.method.rank
    if rank is not None and alpha is not None:
        share = keys[alpha] / keys[rank]
        wanted = config.method.alpha if config.method.alpha is not None else share * (given.get(rank) or values[rank])
        values[alpha] = int(wanted) if wanted == int(wanted) else wanted
    for key in (key for key in keys if key.endswith("_modules")):
        # Some of the layers that were chosen, by name. PEFT's own choice for a model would not be theirs.
        names = [given[key]] if isinstance(given.get(key), str) else list(given.get(key) or ())
        settings[key] = [p for p in settings["target_modules"] if any(f".{p}".endswith(f".{name}") for name in names)]
    try:
        with _quiet():
            return peft_types()[peft_type](**{**values, **given, **settings})
    except Exception as error:
        raise _refusal(peft_type, given, error) from None


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of a default's type; PEFT's dataclasses take anything."""
    if isinstance(default, bool):
        return isinstance(value, bool | str)  # init_lora_weights is True, or a name
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, str):
        return isinstance(value, str)
    # A table in the place of one of PEFT's objects could name a module to import, or a file to read.
    return isinstance(default, dict) or not isinstance(value, dict)


def _refusal(peft_type: str, given: Mapping[str, Any], error: Exception) -> InputError:
    """Make one line of what PEFT said, of the key that it names."""
    said = " ".join(str(error).split()) or type(error).__name__
    named = [key for key in given if key in said]
    field, value = (f"{KEYS}.{named[0]}", given[named[0]]) if named else (TYPE, peft_type)
    return InputError(field, value, f"PEFT refuses it: {said}")


@contextmanager
def _quiet() -> Iterator[None]:
    # Some types show a progress bar.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let all that draws at random draw from a seed, and put back the generators afterwards."""
    chance = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(chance[0])
            np.random.set_state(chance[1])


# Layers with a client axis.


class HeldArray(StackedLayer):
    """One array of an adapter, [K, ...]. Layers that share the array share this object."""

    def __init__(self, value: torch.Tensor, layout: RowLayout) -> None:
        super().__init__(layout)
        self.weight = nn.Parameter(value.detach()[None], False)

    def of(self, client: int) -> torch.Tensor:
        """Return a client's array."""
        return self.weight[client if len(self.weight) > 1 else 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one copy of the array for each of x's rows, which stands for it where its gradients are asked for."""
        copies: torch.Tensor = _Copies.apply(self.weight, len(x))
        return copies


class _Copies(torch.autograd.Function):
    """Stands for a row's own copy of an array: [N, ...], in no memory. Their gradients are the per-example gradients.

    Nobody reads the numbers: :class:`_ByExample` takes them from the array.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rows: int) -> torch.Tensor:
        return weight.new_zeros(()).expand(rows, *weight.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        return None, None  # Opacus' hook has them


@register_grad_sampler(HeldArray)
def held_grad_sample(
    layer: HeldArray, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Per-example gradients for Opacus [N, ...]: those of the rows' copies."""
    return {layer.weight: backprops.to(layer.weight.dtype)}


class PeftLayer(AdapterLayer):
    """A layer of PEFT's, run as a function of its arrays: y = f(x; arrays of the row's client).

    Parameters
    ----------
    base : torch.nn.Linear or transformers Conv1D
        The frozen layer.
    tuner : torch.nn.Module
        PEFT's layer around it.
    held : mapping of str to HeldArray
        By the array's name in the tuner. One that another layer registered already is used and not registered again.
    way : str
        How per-example gradients are taken: VMAP or ROWS.
    layout : RowLayout
    """

    def __init__(
        self, base: nn.Module, tuner: nn.Module, held: Mapping[str, HeldArray], way: str, layout: RowLayout
    ) -> None:
        super().__init__(base, {}, layout)
        self.tuner, self.way, self.held, self.name = tuner, way, dict(held), "a layer of PEFT's"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, ..., n] to [N, ..., m]; see :meth:`AdapterLayer.forward` for an x that the batch shares."""
        rows = self.layout.own_rows(x)
        if rows:
            return OwnRows.of(self.outputs(x.expand(rows, *x.shape[1:])).unsqueeze(1))
        return self.outputs(x)

    def added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return what the adapter changes in the frozen layer's output y."""
        return self.outputs(x) - y

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return every row's output, by its own client's arrays."""
        self.layout.check_rows(len(x), self.name)
        trained = [name for name, held in self.held.items() if held.weight.requires_grad]
        if self.layout.per_example and trained and torch.is_grad_enabled():
            copies = [self.held[name](x.detach()) for name in trained]
            y: torch.Tensor = _ByExample.apply(self, trained, x, *copies)
            return y
        parts = [self.run(part, self.arrays_of(client)) for client, part in self.by_client(x)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def by_client(self, *tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield (client, its rows of each tensor) for all clients that have rows."""
        if max(len(held.weight) for held in self.held.values()) == 1:
            yield 0, *tensors
            return
        split = zip(*(tensor.split(list(self.layout.counts)) for tensor in tensors), strict=True)
        yield from ((client, *parts) for client, parts in enumerate(split) if len(parts[0]))

    def arrays_of(self, client: int) -> Arrays:
        """Return a client's arrays by their names in the tuner."""
        return {name: held.of(client) for name, held in self.held.items()}

    def run(self, x: torch.Tensor, arrays: Arrays) -> torch.Tensor:
        """Run PEFT's layer with these arrays."""
        y: torch.Tensor = functional_call(self.tuner, arrays, (x,))
        return y


class _ByExample(torch.autograd.Function):
    """A layer's outputs, whose backward pass gives every row's own copy of the arrays its gradient."""

    @staticmethod
    def forward(ctx: Any, layer: PeftLayer, trained: list[str], x: torch.Tensor, *copies: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.trained = layer, trained
        ctx.save_for_backward(x)
        # Detached: saved arrays would be those of a graph that nobody goes back through.
        parts = [layer.run(part, _detached(layer.arrays_of(client))) for client, part in layer.by_client(x)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer: PeftLayer = ctx.layer
        sampled = _VECTORISED if layer.way == VMAP else _ROW_BY_ROW
        found = [
            sampled(layer.run, _detached(layer.arrays_of(client)), ctx.trained, rows, g)
            for client, rows, g in layer.by_client(x, gradients[0])
        ]
        samples = [torch.cat([arrays[name] for arrays, _ in found]) for name in ctx.trained]
        return None, None, torch.cat([of_x for _, of_x in found]) if ctx.needs_input_grad[2] else None, *samples


def _detached(arrays: Arrays) -> Arrays:
    return {name: array.detach() for name, array in arrays.items()}


_Run = Callable[[torch.Tensor, Arrays], torch.Tensor]


def vectorised(
    run: _Run, arrays: Arrays, trained: Sequence[str], x: torch.Tensor, g: torch.Tensor
) -> tuple[Arrays, torch.Tensor]:
    """Return each row's gradient of sum(y g), for the trained arrays [N, ...] and for x [N, ...], in one pass."""
    frozen = {name: array for name, array in arrays.items() if name not in trained}

    def product(moving: Arrays, row: torch.Tensor, of_row: torch.Tensor) -> torch.Tensor:
        return (run(row[None], frozen | moving)[0] * of_row).sum()

    found: tuple[Arrays, torch.Tensor] = vmap(grad(product, argnums=(0, 1)), in_dims=(None, 0, 0))(
        {name: arrays[name] for name in trained}, x, g
    )
    return found


def row_by_row(
    run: _Run, arrays: Arrays, trained: Sequence[str], x: torch.Tensor, g: torch.Tensor
) -> tuple[Arrays, torch.Tensor]:
    """Return what :func:`vectorised` does, by a pass for each row."""
    found: list[tuple[torch.Tensor, ...]] = []
    for row, of_row in zip(x.split(1), g.split(1), strict=True):
        leaves = [arrays[name].detach().requires_grad_() for name in trained]
        row = row.detach().requires_grad_()
        with torch.enable_grad():
            y = run(row, arrays | dict(zip(trained, leaves, strict=True)))
            found.append(torch.autograd.grad(y, [*leaves, row], of_row, materialize_grads=True, allow_unused=True))
    *samples, of_x = zip(*found, strict=True)
    return {name: torch.stack(each) for name, each in zip(trained, samples, strict=True)}, torch.cat(of_x)


_VECTORISED, _ROW_BY_ROW = vectorised, row_by_row


# What a type does, measured.


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was measured of a type with its keys, on small layers of drawn weights.

    Attributes
    ----------
    exact : bool
        Whether every layer's output is linear in what is trained, up to a constant: then the mean of the arrays is
        the mean of the updates.
    way : str
        How per-example gradients are taken: VMAP, or ROWS where the layer does not run under it.
    constants : frozenset of str
        Names, in a layer, of arrays that depend on its shape alone: no server has to send them.
    step : float
        By which part of their size trained arrays may move, so that an output moves by a tenth at most.
    """

    exact: bool
    way: str
    constants: frozenset[str]
    step: float


_TOLERANCE = 1e-5
"""Relative. Layers run in float64, but some types take a Fourier transform in float32."""
_STEPS = tuple(2.0**-k for k in range(-8, 15))


def probe(model: nn.Module, paths: Sequence[str], make: Callable[..., PeftConfig], refuse: _Refuse) -> Probe:
    """Try a type on layers of the model's shapes, one of each, with drawn weights.

    Parameters
    ----------
    model : torch.nn.Module
        Or its skeleton: no number of it is read.
    paths : sequence of str
    make : callable
        Makes PEFT's config for ``target_modules`` and a seed.
    refuse : callable
        Makes the error of a type that does not fit, from the reason.

    Raises
    ------
    InputError
        If PEFT cannot put it into these layers, it draws at random in training, it changes the frozen weights, or what
        PEFT saves of it does not give it back.
    """
    shapes: dict[Any, str] = {}
    for path in paths:
        layer = model.get_submodule(path)
        shapes.setdefault((type(layer), linear_shape(layer), layer.bias is not None), path)
    chosen = list(shapes.values())
    toys = [_toy(model, chosen, seed) for seed in (0, 1, 0)]
    configs = [make(target_modules=chosen, seed=seed) for seed in (0, 1, 0)]
    made = [_inject(*pair, chosen, refuse, seed) for seed, pair in enumerate(zip(toys, configs, strict=True))]
    for path in chosen:
        if not _same_base(made[0][1][path], _toy(model, chosen, 0).get_submodule(path)):
            raise refuse("it changes the frozen weights when it is made, and the adapter alone would not say so")
    constants = _constants(made[0][1], made[1][1])
    generator = torch.Generator().manual_seed(0)
    exact, way, step = True, VMAP, _STEPS[0]
    for tuner in made[0][1].values():
        x = torch.randn(3, 4, linear_shape(tuner.get_base_layer())[1], generator=generator, dtype=torch.float64)
        linear, fits, of_layer = _measure(copy.deepcopy(tuner).double(), x, 0, refuse)
        exact, way, step = exact and linear, way if fits else ROWS, min(step, of_layer)
        trained = {name: parameter for name, parameter in tuner.named_parameters() if parameter.requires_grad}
        for name, value in moved_by_chance({n: p.detach() for n, p in trained.items()}, of_layer, 2).items():
            trained[name].data = value
    # The third was drawn anew by the same config: loaded with what PEFT saves of the first, it must compute the same.
    with _quiet():
        set_peft_model_state_dict(made[2][0], get_peft_model_state_dict(made[0][0]))
    for path, tuner in made[0][1].items():
        x = torch.randn(2, 3, linear_shape(tuner.get_base_layer())[1], generator=generator)
        with torch.no_grad():
            if _apart(made[2][1][path](x), tuner(x)) > 1e-4:
                raise refuse("what PEFT saves of it does not give it back, since it draws something else each time")
    return Probe(exact, way, constants, step)


_Refuse = Callable[[str], InputError]


def _toy(model: nn.Module, paths: Sequence[str], seed: int) -> nn.Module:
    """Return a module that has nothing but layers of these paths and shapes, with drawn weights."""
    generator = torch.Generator().manual_seed(seed)
    toy = nn.Module()
    toy.config = getattr(model, "config", None)  # type: ignore[assignment]
    for path in paths:
        layer = model.get_submodule(path)
        m, n = linear_shape(layer)
        made: nn.Module = Conv1D(m, n) if isinstance(layer, Conv1D) else nn.Linear(n, m, layer.bias is not None)
        for parameter in made.parameters():
            parameter.data.normal_(0, n**-0.5, generator=generator)
        place = toy
        *parents, last = path.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, made)
    return toy.requires_grad_(False)


def _same_base(tuner: Any, layer: nn.Module) -> bool:
    now = tuner.get_base_layer()
    return all(
        isinstance(kept := getattr(now, name, None), torch.Tensor) and torch.equal(kept, value)
        for name, value in layer.named_parameters()
    )


def _constants(one: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> frozenset[str]:
    """Name the frozen arrays that neither weights nor seeds change."""
    equal: dict[str, bool] = {}
    for path, tuner in one.items():
        others = dict(_arrays(other[path]))
        for name, array in _arrays(tuner):
            same = not array.requires_grad and array.shape == others[name].shape and torch.equal(array, others[name])
            equal[name] = equal.get(name, True) and same
    return frozenset(name for name, same in equal.items() if same)


def _measure(tuner: nn.Module, x: torch.Tensor, seed: int, refuse: _Refuse) -> tuple[bool, bool, float]:
    """Return whether a layer is linear in what is trained, whether it runs under vmap, and its :attr:`Probe.step`."""
    arrays = {name: array.detach() for name, array in _arrays(tuner)}
    trained = {name: array.detach() for name, array in _arrays(tuner) if array.requires_grad}
    tuner.train()

    def run(x: torch.Tensor, given: Arrays) -> torch.Tensor:
        y: torch.Tensor = functional_call(tuner, given, (x,))
        return y

    def moved(seed: int, step: float) -> Arrays:
        return arrays | moved_by_chance(trained, step, seed)

    try:
        with _quiet(), torch.no_grad():
            start = run(x, arrays)
            # A direction that starts at zero has no small steps.
            step = next((s for s in _STEPS if _apart(run(x, moved(seed, s)), start) <= 0.1), 0.1)
            linear = True
            # So far from the start that rounding is far below what moves, and any curve far above it.
            for scale in (1.0, 8 * step):
                one, other = moved(seed, scale), moved(seed + 1, scale)
                y, again, there = run(x, one), run(x, one), run(x, other)
                half = arrays | {name: (one[name] + other[name]) / 2 for name in trained}
                linear &= _apart(run(x, half) - start, (y + there) / 2 - start) <= _TOLERANCE
    except Exception as error:
        raise refuse(f"its layer does not run alone ({type(error).__name__}: {' '.join(str(error).split())})") from None
    if not torch.equal(y, again):
        raise refuse("it draws at random in training, so that no two runs would be the same; set its dropout to 0")
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    try:
        with _quiet():
            found, of_x = vectorised(run, one, list(trained), x, g)
            expected, of_rows = row_by_row(run, one, list(trained), x, g)
    except Exception:
        return linear, False, step
    fits = all(_apart(found[name], expected[name]) <= _TOLERANCE for name in trained)
    return linear, fits and _apart(of_x, of_rows) <= _TOLERANCE, step


def moved_by_chance(arrays: Arrays, step: float, seed: int) -> Arrays:
    """Move arrays from where they are, each by ``step`` of its own size; those that are zero by ``step``."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, array in arrays.items():
        size = float(array.square().mean().sqrt()) or 1.0
        found[name] = array + step * size * torch.randn(array.shape, generator=generator).to(array.dtype)
    return found


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def _arrays(tuner: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of PEFT's layer that are not the frozen layer's."""
    for name, tensor in (*tuner.named_parameters(), *tuner.named_buffers()):
        if not name.startswith("base_layer."):
            yield name, tensor


# Into a model.


def _inject(
    model: nn.Module, made: PeftConfig, paths: Sequence[str], refuse: _Refuse, seed: int
) -> tuple[PeftModel, dict[str, Any]]:
    """Let PEFT put its layers into a model, in place; return its model, and its layers by path."""
    before = [*model.parameters(), *model.buffers()]
    try:
        with _seeded(seed):
            peft_model: Any = get_peft_model(model, made)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise refuse(f"PEFT cannot put it into these layers ({said})") from None
    layers = {path: model.get_submodule(path) for path in paths}
    alien = [path for path, layer in layers.items() if not isinstance(layer, BaseTunerLayer)]
    if alien:
        raise refuse(f"it leaves {alien[0]} as it was, so that nothing could be trained there")
    if hasattr(peft_model.base_model, "update_and_allocate"):
        raise refuse("it changes its ranks between steps, which no local training asks it to")
    own = {id(array) for layer in layers.values() for _, array in _arrays(layer)}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if outside:
        raise refuse(f"it would train {outside[0]} beside the layers that were chosen")
    known = own | {id(p) for p in before}
    beside = [n for n, a in (*peft_model.named_parameters(), *peft_model.named_buffers()) if id(a) not in known]
    if beside:
        raise refuse(f"it keeps {beside[0]} beside its layers, so that nobody can tell whether clients have the same")
    if any(array._backward_hooks for layer in layers.values() for _, array in _arrays(layer)):
        raise refuse("it changes gradients by hooks, which per-example gradients would go past")
    if not any(p.requires_grad for layer in layers.values() for _, p in _arrays(layer)):
        raise refuse("it trains nothing in these layers")
    return peft_model, layers


class PeftAdaptedModel(AdaptedModel):
    """A base model with adapters of PEFT's in it.

    Attributes
    ----------
    probed : Probe
        What was measured of the type.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: RowLayout,
        adapters: Mapping[str, PeftLayer],
        head: dict[str, StackedLinear],
        held: Mapping[str, HeldArray],
        probed: Probe,
    ) -> None:
        super().__init__(model, layout, "peft", dict(adapters), head)
        self._fingerprint = _fingerprint(adapters.values())
        if self._fingerprint is not None:
            held = {**held, FINGERPRINT: HeldArray(self._fingerprint, layout)}
        self._layers = {name: (layer, "weight") for name, layer in held.items()} | self._layers
        self._name_layers()
        self.probed = probed

    def set_shared(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Set arrays that all clients share; refuse an adapter whose places, made from the seed, are others here."""
        told = arrays.get(FINGERPRINT)
        if told is not None and not torch.equal(told.to(torch.int64).cpu(), self._fingerprint):  # type: ignore[arg-type]
            raise RuntimeError("PEFT makes another adapter of the run's seed here than on the server: other versions?")
        super().set_shared(arrays)

    def drawn(self, seed: int) -> Arrays:
        """Draw what is trained, about its start; what is frozen stays."""
        generator = torch.Generator().manual_seed(seed)
        arrays = moved_by_chance(self.arrays(self.names([TRAINED_KIND])), self.probed.step, seed)
        for name in self.head_names:
            shape = self.parameter(name).shape[1:]
            arrays[name] = torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1.0)
        return arrays


def _fingerprint(layers: Iterable[PeftLayer]) -> torch.Tensor | None:
    """Return 16 whole numbers, the SHA-256 of what PEFT made from the seed and keeps in plain attributes; None of none.

    These are places in a matrix: no arrays that could be sent, since a layer takes them from where they are.
    """
    found = hashlib.sha256()
    places = [(name, tensor) for layer in layers for name, tensor in _plain_tensors(layer.tuner)]
    for name, tensor in places:
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().to(torch.int64).numpy().tobytes())
    return torch.from_numpy(np.frombuffer(found.digest(), np.uint16).astype(np.int64)) if places else None


def _plain_tensors(tuner: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in vars(tuner).items():
        if key not in ("_parameters", "_buffers", "_modules"):
            for name, tensor in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(tensor, torch.Tensor):
                    yield f"{key}.{name}", tensor


def adapt_peft(model: nn.Module, config: Config, peft_type: str, given: Mapping[str, Any]) -> PeftAdaptedModel:
    """Put adapters of PEFT's and a stacked head into a frozen base model, in place.

    Parameters
    ----------
    model : torch.nn.Module
        From :func:`fedlora.models.load_base`; a skeleton without weights will do.
    config : Config
    peft_type : str
    given : mapping
        The type's own keys.

    Returns
    -------
    PeftAdaptedModel
        Arrays as PEFT draws them from the run's seed; nothing trained yet.

    Raises
    ------
    InputError
        If no module matches, or the type does not fit.
    """

    def refuse(why: str) -> InputError:
        named = [key for key in given if key in why]
        field, value = (f"{KEYS}.{named[0]}", given[named[0]]) if named else (TYPE, peft_type)
        return InputError(field, value, f"is not carried here: {why}")

    layout = RowLayout()
    never_cache(model)
    head = head_of(model)
    paths, notes = chosen_paths(model, config, head[0] if head else None)
    mean_pooled = isinstance(model, MeanPoolingClassifier)
    whole = set() if mean_pooled or not head else saved_whole(model, [head[0]], ())
    if not_adapted := [path for path in paths if path in whole]:
        notes.append(f"PEFT saves {', '.join(not_adapted)} whole, like the head; no adapter is put there")
        paths = [path for path in paths if path not in whole]
    transposed = any(isinstance(model.get_submodule(path), Conv1D) for path in paths)
    fan = {"fan_in_fan_out": True} if transposed and "fan_in_fan_out" in own_keys(peft_type) else {}

    def make(seed: int | None = None, **settings: Any) -> PeftConfig:
        return peft_config(peft_type, given, config, seed, **fan, **settings)

    probed = probe(model, paths, make, refuse)
    bases = {path: model.get_submodule(path) for path in paths}
    for base in bases.values():
        if base.weight.is_meta:
            _weigh_nothing(base)
    _, tuners = _inject(model, make(target_modules=paths), paths, refuse, config.run.seed)
    held: dict[str, HeldArray] = {}
    adapters = _layers_of(tuners, bases, held, probed, layout, refuse)
    for path, layer in adapters.items():
        model.set_submodule(path, layer)
    adapted = PeftAdaptedModel(model, layout, adapters, stacked_head(model, head, layout), held, probed)
    adapted.notes += notes
    if config.privacy.mode != "none" and probed.way == ROWS:
        adapted.notes.append(
            f"per-example gradients of {peft_type} are taken {ROWS}: it does not run under torch's vmap"
        )
    return adapted


def _layers_of(
    tuners: Mapping[str, Any],
    bases: Mapping[str, nn.Module],
    held: dict[str, HeldArray],
    probed: Probe,
    layout: RowLayout,
    refuse: _Refuse,
) -> dict[str, PeftLayer]:
    """Return what takes the layers' places, and add their arrays to ``held``, by name; shared ones once."""
    shared: dict[int, HeldArray] = {}
    adapters = {}
    for path, tuner in tuners.items():
        mine: dict[str, HeldArray] = {}
        fresh: list[HeldArray] = []
        for name, array in _arrays(tuner):
            if name in probed.constants:
                continue
            if id(array) not in shared:
                kind = TRAINED_KIND if array.requires_grad else DRAWN_KIND
                value = array.detach().to(bases[path].weight.device)  # type: ignore[arg-type]
                if value.is_floating_point():
                    value = value.to(adapter_dtype(bases[path]))
                elif value.numel() and int(value.abs().max()) > _LARGEST:
                    raise refuse(
                        f"{name} holds whole numbers above {_LARGEST:,}, which float32 on the wire would round"
                    )
                shared[id(array)] = held[f"{path}.{name.replace(_DEFAULT, '', 1)}.{kind}"] = HeldArray(value, layout)
                fresh.append(shared[id(array)])
            mine[name] = shared[id(array)]
        tuner.requires_grad_(False)
        adapters[path] = PeftLayer(bases[path], tuner, mine, probed.way, layout)
        adapters[path].name = path
        for i, one in enumerate(fresh):
            adapters[path].add_module(f"held_{i}", one)
    return adapters


def _weigh_nothing(base: nn.Module) -> None:
    """Give a skeleton's layer zeros that take no memory: PEFT looks at weights when it makes its layers."""
    for name, parameter in list(base.named_parameters()):
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        setattr(base, name, nn.Parameter(zeros, requires_grad=False))


# Out of it.


def export_adapter(
    adapted: PeftAdaptedModel,
    config: Config,
    peft_type: str,
    given: Mapping[str, Any],
    folder: Path,
    label_names: list[str] | None,
) -> None:
    """Write client 0's arrays as PEFT's own ``save_pretrained`` does.

    The base is loaded once more, since PEFT saves models and not arrays. Layers whose weights the checkpoint lacks are
    in the adapter whole, like the head; the head of mean pooling, which no stock model has, lies beside it.

    Parameters
    ----------
    adapted : PeftAdaptedModel
    config : Config
    peft_type : str
    given : mapping
        The type's own keys.
    folder : Path
    label_names : list of str or None
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_about(config, folder, label_names)
    stock: Any = load_base(config, label_names)
    head, prefix, whole = adapted.arrays(adapted.head_names), "", set()
    saved: dict[str, Any] = {}
    if isinstance(stock, MeanPoolingClassifier):
        save_file(head, folder / HEAD_FILE)
        stock, head, prefix = stock.encoder, {}, "encoder."
    elif head:
        heads = sorted({name.split(".")[0] for name in head})
        whole = saved_whole(stock, heads, ())
        saved["modules_to_save"] = [*heads, *sorted(whole)]
    if any(isinstance(layer.base, Conv1D) for layer in adapted.adapters.values()):
        saved |= {"fan_in_fan_out": True} if "fan_in_fan_out" in own_keys(peft_type) else {}
    paths = {path.removeprefix(prefix): layer for path, layer in adapted.adapters.items()}
    made = peft_config(peft_type, given, config, target_modules=list(paths), task_type=task_type(config), **saved)
    with _seeded(config.run.seed):
        peft_model: Any = get_peft_model(stock, made)
    for path, layer in paths.items():
        assert isinstance(layer, PeftLayer)
        values = layer.arrays_of(0)
        for name, array in _arrays(stock.get_submodule(path)):
            if name in values:
                array.data = values[name].detach().to(array.device, copy=True)
    for path in whole:
        head |= {f"{path}.{n}": p.detach() for n, p in adapted.model.get_submodule(path).named_parameters()}
    for path, wrapper in stock.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for name, parameter in wrapper.modules_to_save["default"].named_parameters():
                parameter.data = head[f"{path}.{name}"].to(parameter.device, copy=True)
    made.base_model_name_or_path = pretrained_source(config)
    with _quiet():
        peft_model.save_pretrained(str(folder))
