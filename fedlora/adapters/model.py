"""A frozen base model with adapters and a trainable head in it.

:func:`adapt` chooses the target modules as PEFT does, puts an adapter layer in the place of each, and turns
the head's linear layers into stacked ones. The result, an :class:`AdaptedModel`, is what clients train and the server
evaluates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlora import output_layer
from fedlora.adapters.layers import AdapterLayer, adapter_dtype
from fedlora.adapters.reach import unreached
from fedlora.adapters.stacked import RowLayout, StackedLayer, StackedLinear
from fedlora.adapters.targets import ALL_LINEAR, beyond_linear, target_paths
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.devices import devices_of, move_inputs
from fedlora.errors import InputError
from fedlora.models import (
    SHORT_TEXTS,
    head_of,
    run_short_text,
    unchanged,
)
from fedlora.models import dense_weight as dense_weight
from fedlora.models import linear_shape as linear_shape
from fedlora.output_layer import HiddenStates, OutputLayer
from fedlora.registry import PARAMETERISATIONS
from fedlora.roles import HEAD, kind_of

if TYPE_CHECKING:
    from fedlora.adapters.parameterisations import Parameterisation
    from fedlora.tasks import Task

_ANY_RANK = (HEAD, "residual")
"""Parts of a model that are the same at every rank of its factors."""

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's: it plans every new shape for 10 ms, and a Poisson-sampled cohort has a new shape at every step."""


class AdaptedModel:
    """A base model whose adapters and head have a client axis.

    Attributes
    ----------
    model : torch.nn.Module
        Maps ``input_ids`` and ``attention_mask`` to an output with ``logits``.
    layout : RowLayout
    kind : str
        The parameterisation's name.
    adapters : dict of str to AdapterLayer
        By module path.
    head : dict of str to StackedLinear
        By module path; empty for causal language models.
    trained : tuple of str
        Names of the arrays that clients train, of the last :meth:`set_clients`.
    versions : dict of str to str
        Version of each kind of array that was set last (:mod:`fedlora.clients.held`).
    notes : list of str
        What the user should know of the model and of the modules that were chosen.
    independent : dict
        Results of :func:`fedlora.training.soundness.dependence`, which is measured once for a model.
    digests : dict of str to str
        Of the frozen weights, once :func:`fedlora.results.identity.weight_digests` was asked for them.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: RowLayout,
        kind: str,
        adapters: dict[str, AdapterLayer],
        head: dict[str, StackedLinear],
    ) -> None:
        self.model, self.layout, self.kind, self.adapters, self.head = move_inputs(model), layout, kind, adapters, head
        self._layers: dict[str, tuple[StackedLayer, str]] = {}
        for path, adapter in adapters.items():
            for factor in adapter.factors:
                self._layers[f"{path}.{factor}"] = (getattr(adapter, factor), "weight")
        for path, layer in head.items():
            self._layers[f"{path}.weight"] = (layer, "weight")
            if layer.bias is not None:
                self._layers[f"{path}.bias"] = (layer, "bias")
        self._name_layers()
        self.trained: tuple[str, ...] = ()
        self.versions: dict[str, str] = {}
        self.notes: list[str] = list(getattr(model, "notes", ()))
        self.independent: dict[tuple[Any, ...], str | None] = {}
        self.digests: dict[str, str] = {}
        self._other_ranks: dict[tuple[tuple[int, ...], ...], tuple[Arrays, dict[str, str]]] = {}

    @property
    def device(self) -> torch.device:
        """Where batches go and logits come from: the first device of a model that is split over several."""
        return next(self.model.parameters()).device

    @property
    def devices(self) -> list[torch.device]:
        """All devices of the model, the first one first."""
        return devices_of(self.model)

    def _name_layers(self) -> None:
        """Tell layers their names, for errors."""
        for name, layer in self.stacked_layers().items():
            layer.name = name

    def stacked_layers(self) -> dict[str, StackedLayer]:
        """Layers with a client axis, by the name of their weight."""
        return {name: layer for name, (layer, attribute) in self._layers.items() if attribute == "weight"}

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the head's arrays."""
        return tuple(name for name in self._layers if name.rpartition(".")[0] in self.head)

    def names(self, kinds: Iterable[str]) -> tuple[str, ...]:
        """Names of the arrays of the given kinds: factors in all layers, and :data:`~fedlora.roles.HEAD`."""
        wanted, head = set(kinds), set(self.head_names)
        return tuple(name for name in self._layers if kind_of(name, head) in wanted)

    def parameter(self, name: str) -> nn.Parameter:
        """Return the stacked parameter of a name, of shape [K, ...]."""
        layer, attribute = self._layers[name]
        parameter: nn.Parameter = getattr(layer, attribute)
        return parameter

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters, in a fixed order."""
        return [self.parameter(name) for name in self.trained]

    def arrays(self, names: Iterable[str] | None = None, client: int = 0) -> Arrays:
        """Copy one client's arrays (all of them by default) to the CPU, without the client axis."""
        chosen = self._layers if names is None else names
        return {
            name: (p[client] if len(p := self.parameter(name)) > 1 else p[0]).detach().cpu().clone() for name in chosen
        }

    def trained_arrays(self, clients: Sequence[int]) -> list[Arrays]:
        """Copy the trained arrays of some clients to the CPU, in one transfer; they are views of one tensor."""
        parameters = [self.parameter(name).detach() for name in self.trained]
        home, chosen = self.device, torch.tensor(clients, device=self.device)
        flat = torch.cat([p.index_select(0, chosen.to(p.device)).flatten(1).to(home) for p in parameters], 1)
        # A GPU copies into pinned memory several times as fast.
        flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda).copy_(flat)
        parts = [part.unbind() for part in flat.split([p[0].numel() for p in parameters], 1)]
        shapes = [p.shape[1:] for p in parameters]
        return [
            {name: part[i].view(shape) for name, part, shape in zip(self.trained, parts, shapes, strict=True)}
            for i in range(len(clients))
        ]

    def drawn(self, seed: int) -> Arrays:
        """Draw factors and head so that each has a gradient; a branch's matrix is a tenth of its layer's."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {
            f"{path}.{f}": adapter.drawn_scale(f) for path, adapter in self.adapters.items() for f in adapter.factors
        }
        arrays: Arrays = {}
        for name in (*self.stacked_layers(), *(n for n in self.head_names if n.endswith(".bias"))):
            shape = self.parameter(name).shape[1:]
            value = torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1.0)
            arrays[name] = value * sizes.get(name, 1.0)
        return arrays

    def set_shared(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Set arrays that all clients share and that are not trained.

        Raises
        ------
        KeyError, ValueError
            If a name or a shape is not the model's.
        """
        for name, array in arrays.items():
            layer, attribute = self._layers[name]
            old = getattr(layer, attribute)
            _check_shape(name, array, old.shape[1:])
            value = array.detach().to(old.device, old.dtype)[None].clone()
            setattr(layer, attribute, nn.Parameter(value, requires_grad=False))

    def set_clients(self, clients: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Give every client of a cohort its own trained arrays; all clients train the same names."""
        self.trained = tuple(name for name in self._layers if name in clients[0])
        if len(self.trained) != len(clients[0]):
            unknown = sorted(set(clients[0]) - set(self._layers))
            raise ValueError(f"the model has no arrays named {unknown[:3]}")
        trained = set(self.trained)
        for kind in {kind_of(name, self.head_names) for name in trained}:
            self.versions.pop(kind, None)  # training moves these arrays away from the version that was set
        for name, (layer, attribute) in self._layers.items():
            old = getattr(layer, attribute)
            if name not in trained:
                if len(old) > 1 or old.requires_grad:
                    setattr(layer, attribute, nn.Parameter(old[:1].detach().clone(), requires_grad=False))
                continue
            expected = tuple(old.shape[1:])
            for client in clients:
                _check_shape(name, client[name], expected)
            if all(client[name] is clients[0][name] for client in clients):
                value = clients[0][name].to(old.device, old.dtype).expand(len(clients), *expected).clone()
            else:
                value = torch.stack([client[name] for client in clients]).to(old.device, old.dtype)
            setattr(layer, attribute, nn.Parameter(value, requires_grad=True))

    @property
    def residual(self) -> Arrays:
        """Residuals [m, n] of the frozen weights, by module path."""
        return {path: a.residual for path, a in self.adapters.items() if a.residual is not None}

    def set_residual(self, residuals: Mapping[str, torch.Tensor]) -> None:
        """Replace the residuals of all frozen weights; a layer that is not named has none.

        Raises
        ------
        KeyError, ValueError
            If a path or a shape is not the model's.
        """
        for path, value in residuals.items():
            _check_shape(f"the residual of {path}", value, linear_shape(self.adapters[path].base))
        for path, adapter in self.adapters.items():
            added = residuals.get(path)
            dtype = adapter_dtype(adapter.base)
            adapter.residual = None if added is None else added.detach().to(adapter.weight.device, dtype)

    def shapes_at(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all factors at a rank; those of a smaller rank are leading blocks of a larger one's."""
        parameterisation: Parameterisation = PARAMETERISATIONS.made(self.kind)
        found: dict[str, tuple[int, ...]] = {}
        for path, adapter in self.adapters.items():
            of_layer = parameterisation.shapes_at(adapter, rank)
            found |= {f"{path}.{factor}": tuple(of_layer[factor]) for factor in adapter.factors}
        return found

    def set_rank(self, rank: int) -> None:
        """Let the factors be of a rank, with the values and versions that were last set at it; zero at first.

        All that trains, is clipped or gets noise is then of that rank. The branch's scale stays that of the config.
        """
        shapes = self.shapes_at(rank)
        here = {name: self.parameter(name).detach() for name in shapes}
        now, then = tuple(tuple(p.shape[1:]) for p in here.values()), tuple(shapes.values())
        if now == then:
            return
        own = {part: version for part, version in self.versions.items() if part not in _ANY_RANK}
        # One client's arrays, not those of a whole cohort.
        self._other_ranks[now] = {name: p if len(p) == 1 else p[:1].clone() for name, p in here.items()}, own
        arrays, versions = self._other_ranks.pop(then, ({}, {}))
        for name, shape in shapes.items():
            layer, attribute = self._layers[name]
            value = arrays[name] if name in arrays else here[name].new_zeros(1, *shape)
            setattr(layer, attribute, nn.Parameter(value, requires_grad=False))
        self.versions = {part: v for part, v in self.versions.items() if part in _ANY_RANK} | versions
        self.trained = ()

    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the model on ``input_ids`` and ``attention_mask`` (absent: nothing is padded) and return its logits.

        Batches of pairs have ``token_type_ids`` too, and those of several texts in a row ``position_ids``.
        """
        mask = batch.get("attention_mask")
        if mask is not None and not self.head:
            mask = None  # a causal model's tokens never see the padding on their right
        with attention_kernels():
            more = {name: batch[name] for name in ("token_type_ids", "position_ids") if name in batch}
            output: Any = self.model(input_ids=batch["input_ids"], attention_mask=mask, **more)
        logits: torch.Tensor = output.logits
        return logits.to(batch["input_ids"].device)

    def outputs(self, batch: Mapping[str, torch.Tensor], task: Task) -> Any:
        """Run the model on a batch; return what the task's loss is taken from.

        Returns
        -------
        Tensor or HiddenStates
            The logits. Where these would be more than a chunk of :mod:`fedlora.output_layer`, the task can do without,
            and the model's output layer is known, it is the layer's inputs, and the logits are never made.
        """
        model: Any = self.model
        layer: Any = model.get_output_embeddings() if task.takes_hidden_states else None
        small = type(layer) is not nn.Linear or batch["input_ids"].numel() * layer.out_features <= output_layer.CHUNK
        if small or self._output is None:
            return self.logits(batch)
        states: list[torch.Tensor] = []

        def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            states.extend(inputs)
            return inputs[0][:1, :1].detach()  # the model goes on with one token

        hook = layer.register_forward_pre_hook(keep)
        try:
            self.logits(batch)
        finally:
            hook.remove()
        return HiddenStates(states[0].to(batch["input_ids"].device), self._output)

    @cached_property
    def _output(self) -> OutputLayer | None:
        """The output layer of a causal model, if it is known what the model does to its outputs."""
        layout = dict(vars(self.layout))
        with torch.no_grad(), unchanged(self.model), torch.compiler.set_stance("force_eager"):
            self.model.eval()
            # All rows are the first client's.
            self.layout.set_rows([SHORT_TEXTS, *[0] * (len(self.layout.counts) - 1)])
            try:
                return output_layer.find_output_layer(self.model, lambda: run_short_text(self.model))
            finally:
                vars(self.layout).update(layout)


def attention_kernels() -> AbstractContextManager[None]:
    """Choose among the kernels of torch's attention as every pass here does."""
    return sdpa_kernel(_ATTENTION)


def _check_shape(what: str, array: torch.Tensor, expected: Sequence[int]) -> None:
    if tuple(array.shape) != tuple(expected):
        raise ValueError(f"{what} has shape {tuple(array.shape)}, expected {tuple(expected)}")


def adapt(model: nn.Module, config: Config, kind: str) -> AdaptedModel:
    """Put adapters and a stacked head into a frozen base model, in place.

    Parameters
    ----------
    model : torch.nn.Module
        From :func:`fedlora.models.load_base`; frozen.
    config : Config
        ``method.rank``, ``alpha``, ``target_modules``, ``exclude_modules`` and ``dropout`` are used.
    kind : str
        The parameterisation: a name in :data:`fedlora.registry.PARAMETERISATIONS`.

    Returns
    -------
    AdaptedModel
        All factors zero and the head as loaded; nothing trained yet.

    Raises
    ------
    InputError
        If no module matches, a matched module is no linear layer, an adapter would do nothing in one that was named,
        or the parameterisation does not fit a layer, as a rank above its size.
    """
    parameterisation: Parameterisation = PARAMETERISATIONS.made(kind)
    layout = RowLayout()
    never_cache(model)
    head = head_of(model)
    paths, notes = chosen_paths(model, config, head[0] if head else None)
    adapters: dict[str, AdapterLayer] = {}
    for path in paths:
        adapters[path] = parameterisation.layer(path, model.get_submodule(path), config, layout)
    for path, adapter in adapters.items():
        model.set_submodule(path, adapter)
    adapted = AdaptedModel(model, layout, kind, adapters, stacked_head(model, head, layout))
    adapted.notes += notes
    return adapted


def stacked_head(model: nn.Module, head: tuple[str, nn.Module] | None, layout: RowLayout) -> dict[str, StackedLinear]:
    """Give the head's linear layers a client axis, in place, once the adapters are in the model; return them by path.

    Parameters
    ----------
    model : torch.nn.Module
    head : (str, torch.nn.Module) or None
        Its path, and itself: :func:`fedlora.models.head_of`.
    layout : RowLayout
    """
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        # In evaluation torch's own layer would compute with its layers' weights, past the adapters.
        torch.backends.mha.set_fastpath_enabled(False)
    layers: dict[str, StackedLinear] = {}
    if head:
        linears = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)]
        for path, linear in linears:
            if path == head[0] or path.startswith(f"{head[0]}."):
                layers[path] = _stacked_copy(linear, layout)
                model.set_submodule(path, layers[path])
    return layers


def chosen_paths(model: nn.Module, config: Config, head: str | None) -> tuple[list[str], list[str]]:
    """Return the paths of the modules to adapt, and what to say about those that are not.

    Parameters
    ----------
    model : torch.nn.Module
    config : Config
        ``method.target_modules`` and ``exclude_modules``.
    head : str or None
        Path of the head.

    Raises
    ------
    InputError
        If no module matches, or an adapter would do nothing in one that was named.
    """
    targets, excluded = config.method.target_modules, config.method.exclude_modules
    field = "method.target_modules"
    paths = target_paths(model, targets, head, excluded)
    out = unreached(model, paths)
    by_reason: dict[str, list[str]] = {}
    for path, reason in out.items():
        by_reason.setdefault(reason, []).append(path)
    named = [f"{', '.join(found[:3])}{', ...' if len(found) > 3 else ''}: {why}" for why, found in by_reason.items()]
    if out and targets not in (None, ALL_LINEAR):
        raise InputError(field, targets, f"an adapter would not work in {'; '.join(named)}; name other modules")
    paths = [path for path in paths if path not in out]
    if not paths:
        raise InputError(field, targets, f"an adapter would not work in {'; '.join(named)}; choose another model")
    chosen = targets or "the default of method.target_modules"
    notes = [f"{chosen} leaves out {len(out)} layers ({'; '.join(named)})"] if out else []
    if targets == ALL_LINEAR:
        names, numbers = beyond_linear(model)
        if names:
            total = sum(parameter.numel() for parameter in model.parameters())
            share = f"{numbers:,} of {total:,} parameters"
            notes.append(f"all-linear does not reach {', '.join(names)} ({share}): they are no linear layers")
    return paths, notes


def never_cache(model: nn.Module) -> None:
    """Switch the cache of keys and values off: nothing is generated here, and it would only copy them."""
    for module in model.modules():
        base_config: Any = getattr(module, "config", None)
        if getattr(base_config, "use_cache", False):
            base_config.use_cache = False


def _stacked_copy(linear: nn.Linear, layout: RowLayout) -> StackedLinear:
    weight = linear.weight.detach()
    dtype = adapter_dtype(linear)
    stacked = StackedLinear(
        linear.in_features, linear.out_features, layout, linear.bias is not None, dtype, weight.device
    )
    stacked.weight = nn.Parameter(weight.to(dtype)[None].clone(), requires_grad=False)
    if linear.bias is not None:
        stacked.bias = nn.Parameter(linear.bias.detach().to(dtype)[None].clone(), requires_grad=False)
    return stacked
