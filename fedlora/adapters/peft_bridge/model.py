"""A frozen base model with adapters of PEFT's in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.layers import adapter_dtype
from fedlora.adapters.model import AdaptedModel, chosen_paths, never_cache, stacked_head
from fedlora.adapters.peft_bridge.config import KEYS, TYPE, own_keys, peft_config
from fedlora.adapters.peft_bridge.inject import Refuse, inject
from fedlora.adapters.peft_bridge.layers import ROWS, HeldArray, PeftLayer, adapter_arrays
from fedlora.adapters.peft_bridge.probe import Probe, moved_by_chance, probe
from fedlora.adapters.peft_format import saved_whole
from fedlora.adapters.stacked import RowLayout, StackedLinear
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.models import MeanPoolingClassifier, head_of
from fedlora.registry import MECHANISMS

TRAINED_KIND, DRAWN_KIND = "trained", "drawn"
"""Kinds of an adapter's arrays: those that PEFT trains, and those that it makes once and never trains."""
FINGERPRINT = f"peft.fingerprint.{DRAWN_KIND}"

_LARGEST = 2**24
"""Float32 on the wire holds every whole number up to it."""
_DEFAULT = ".default"  # PEFT's name for the one adapter


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
    _, tuners = inject(model, make(target_modules=paths), paths, refuse, config.run.seed)
    held: dict[str, HeldArray] = {}
    adapters = _layers_of(tuners, bases, held, probed, layout, refuse)
    for path, layer in adapters.items():
        model.set_submodule(path, layer)
    adapted = PeftAdaptedModel(model, layout, adapters, stacked_head(model, head, layout), held, probed)
    adapted.notes += notes
    if MECHANISMS.get(config.privacy.mode).clips_examples and probed.way == ROWS:
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
    refuse: Refuse,
) -> dict[str, PeftLayer]:
    """Return what takes the layers' places, and add their arrays to ``held``, by name; shared ones once."""
    shared: dict[int, HeldArray] = {}
    adapters = {}
    for path, tuner in tuners.items():
        mine: dict[str, HeldArray] = {}
        fresh: list[HeldArray] = []
        for name, array in adapter_arrays(tuner):
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
