"""What a type of PEFT's does, measured on small layers of drawn weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.peft_bridge.bounds import MADE, RUN, Bounded, quiet, said
from fedlora.adapters.peft_bridge.inject import Refuse, inject
from fedlora.adapters.peft_bridge.layers import ROWS, VMAP, adapter_arrays, row_by_row, vectorised
from fedlora.arrays import Arrays
from fedlora.models import linear_shape


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


def probe(model: nn.Module, paths: Sequence[str], make: Callable[..., PeftConfig], refuse: Refuse) -> Probe:
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
    made = []
    for seed, (toy, config) in enumerate(zip(toys, configs, strict=True)):
        with Bounded([toy.get_submodule(path) for path in chosen], MADE):
            made.append(inject(toy, config, chosen, refuse, seed))
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
    with quiet():
        set_peft_model_state_dict(made[2][0], get_peft_model_state_dict(made[0][0]))
    for path, tuner in made[0][1].items():
        x = torch.randn(2, 3, linear_shape(tuner.get_base_layer())[1], generator=generator)
        with torch.no_grad():
            if _apart(made[2][1][path](x), tuner(x)) > 1e-4:
                raise refuse("what PEFT saves of it does not give it back, since it draws something else each time")
    return Probe(exact, way, constants, step)


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
        others = dict(adapter_arrays(other[path]))
        for name, array in adapter_arrays(tuner):
            same = not array.requires_grad and array.shape == others[name].shape and torch.equal(array, others[name])
            equal[name] = equal.get(name, True) and same
    return frozenset(name for name, same in equal.items() if same)


def _measure(tuner: nn.Module, x: torch.Tensor, seed: int, refuse: Refuse) -> tuple[bool, bool, float]:
    """Return whether a layer is linear in what is trained, whether it runs under vmap, and its :attr:`Probe.step`."""
    arrays = {name: array.detach() for name, array in adapter_arrays(tuner)}
    trained = {name: array.detach() for name, array in adapter_arrays(tuner) if array.requires_grad}
    tuner.train()

    def run(x: torch.Tensor, given: Arrays) -> torch.Tensor:
        y: torch.Tensor = functional_call(tuner, given, (x,))
        return y

    def moved(seed: int, step: float) -> Arrays:
        return arrays | moved_by_chance(trained, step, seed)

    try:
        with quiet(), torch.no_grad():
            with Bounded([tuner], RUN):
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
        raise refuse(f"its layer does not run alone ({said(error)})") from None
    if not torch.equal(y, again):
        raise refuse("it draws at random in training, so that no two runs would be the same; set its dropout to 0")
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    try:
        with quiet():
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
