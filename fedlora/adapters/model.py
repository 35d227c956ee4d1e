"""A frozen base model with adapters and a trainable head in it.

:func:`adapt` chooses the target modules as PEFT does, puts a :class:`FactoredLinear` in the place of each, and turns
the head's linear layers into stacked ones. The result, an :class:`AdaptedModel`, is what clients train and the server
evaluates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import lora, sb
from fedlora.adapters.own_rows import OwnRows
from fedlora.adapters.stacked import ClientDropout, RowLayout, StackedLinear
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.models import MeanPoolingClassifier, head_of, unhurried_mask
from fedlora.models import dense_weight as dense_weight
from fedlora.models import linear_shape as linear_shape

PARAMETERISATIONS: dict[str, ModuleType] = {"lora": lora, "sb": sb}

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's: it plans every new shape for 10 ms, and a Poisson-sampled cohort has a new shape at every step."""

Arrays = dict[str, torch.Tensor]
"""Arrays without a client axis: ``MODULE.FACTOR`` for adapters, ``MODULE.weight`` and ``MODULE.bias`` for the head."""


class FactoredLinear(nn.Module):
    """A frozen linear layer plus a product of small factors: y = W0 x + s F_k ... F_1 x.

    Parameters
    ----------
    base : torch.nn.Linear or transformers Conv1D
        The frozen layer, of m outputs and n inputs.
    factors : mapping of str to (int, int)
        Name to shape (rows, columns), in the order in which the input meets them.
    scaling : float
        s = alpha / rank.
    dropout : float
        On the branch's input, as in PEFT.
    """

    def __init__(
        self,
        base: nn.Module,
        factors: Mapping[str, tuple[int, int]],
        scaling: float,
        layout: RowLayout,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.factors = tuple(factors)
        self.scaling = scaling
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        # A half-precision base keeps full-precision adapters: their updates would be lost in bf16's 8 bits.
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        self.dropout = ClientDropout(dropout, layout)
        for name, (rows, columns) in factors.items():
            self.add_module(name, StackedLinear(columns, rows, layout, dtype=dtype, device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, T, n] to [N, T, m]; an x [1, T, n] that the batch shares, to each example's own."""
        rows = self.dropout.layout.own_rows(x)
        if rows:
            return OwnRows.of((self.base(x) + self.branch(x.expand(rows, *x.shape[1:]))).unsqueeze(1))
        return self.base(x) + self.branch(x)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the factors add to the frozen layer's output: s F_k ... F_1 x."""
        first, *others = self.factors
        branch = getattr(self, first)(self.dropout(x))
        if self.scaling != 1:
            branch = self.scaling * branch  # here it has the rank's width, not the layer's
        for name in others:
            branch = getattr(self, name)(branch)
        return branch


class AdaptedModel:
    """A base model whose adapters and head have a client axis.

    Attributes
    ----------
    model : torch.nn.Module
        Maps ``input_ids`` and ``attention_mask`` to an output with ``logits``.
    layout : RowLayout
    kind : str
        The parameterisation, ``lora`` or ``sb``.
    adapters : dict of str to FactoredLinear
        By module path.
    head : dict of str to StackedLinear
        By module path; empty for causal language models.
    trained : tuple of str
        Names of the arrays that clients train, of the last :meth:`set_clients`.
    initial : str or None
        Digest of the frozen arrays that were set, for those who keep account of it.
    independent : dict
        What was measured of the examples of a batch, by :func:`fedlora.training.soundness.dependence`.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: RowLayout,
        kind: str,
        adapters: dict[str, FactoredLinear],
        head: dict[str, StackedLinear],
    ) -> None:
        self.model, self.layout, self.kind, self.adapters, self.head = model, layout, kind, adapters, head
        self._layers: dict[str, tuple[StackedLinear, str]] = {}
        for path, adapter in adapters.items():
            for factor in adapter.factors:
                self._layers[f"{path}.{factor}"] = (getattr(adapter, factor), "weight")
        for path, layer in head.items():
            self._layers[f"{path}.weight"] = (layer, "weight")
            if layer.bias is not None:
                self._layers[f"{path}.bias"] = (layer, "bias")
        self._name_layers()
        self.trained: tuple[str, ...] = ()
        self.initial: str | None = None
        self.independent: dict[tuple[int, int], str | None] = {}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    def _name_layers(self) -> None:
        """Tell layers their names, for errors."""
        for name, layer in self.stacked_layers().items():
            layer.name = name

    def stacked_layers(self) -> dict[str, StackedLinear]:
        """Layers with a client axis, by the name of their weight."""
        return {name: layer for name, (layer, attribute) in self._layers.items() if attribute == "weight"}

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the head's arrays."""
        return tuple(name for name in self._layers if name.rpartition(".")[0] in self.head)

    def names(self, factors: Iterable[str]) -> tuple[str, ...]:
        """Names of the arrays of the given factors in all layers, and of the head."""
        wanted = set(factors)
        head = set(self.head_names)
        return tuple(n for n in self._layers if n.rpartition(".")[2] in wanted or n in head)

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
        chosen = torch.tensor(clients, device=self.device)
        flat = torch.cat([p.index_select(0, chosen).flatten(1) for p in parameters], 1).cpu()
        parts = [part.unbind() for part in flat.split([p[0].numel() for p in parameters], 1)]
        shapes = [p.shape[1:] for p in parameters]
        return [
            {name: part[i].view(shape) for name, part, shape in zip(self.trained, parts, shapes, strict=True)}
            for i in range(len(clients))
        ]

    def set_shared(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Set arrays that all clients share and nobody trains.

        Raises
        ------
        KeyError, ValueError
            If a name or a shape is not the model's.
        """
        for name, array in arrays.items():
            layer, attribute = self._layers[name]
            old = getattr(layer, attribute)
            if tuple(array.shape) != tuple(old.shape[1:]):
                raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {tuple(old.shape[1:])}")
            value = array.detach().to(old.device, old.dtype)[None].clone()
            setattr(layer, attribute, nn.Parameter(value, requires_grad=False))

    def set_clients(self, clients: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Give every client of a cohort its own trained arrays; all clients train the same names."""
        self.trained = tuple(name for name in self._layers if name in clients[0])
        if len(self.trained) != len(clients[0]):
            unknown = sorted(set(clients[0]) - set(self._layers))
            raise ValueError(f"the model has no arrays named {unknown[:3]}")
        trained = set(self.trained)
        for name, (layer, attribute) in self._layers.items():
            old = getattr(layer, attribute)
            if name not in trained:
                if len(old) > 1 or old.requires_grad:
                    setattr(layer, attribute, nn.Parameter(old[:1].detach().clone(), requires_grad=False))
                continue
            expected = tuple(old.shape[1:])
            for client in clients:
                if tuple(client[name].shape) != expected:
                    raise ValueError(f"{name} has shape {tuple(client[name].shape)}, expected {expected}")
            if all(client[name] is clients[0][name] for client in clients):
                value = clients[0][name].to(old.device, old.dtype).expand(len(clients), *expected).clone()
            else:
                value = torch.stack([client[name] for client in clients]).to(old.device, old.dtype)
            setattr(layer, attribute, nn.Parameter(value, requires_grad=True))

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Get ready for a message with these settings; a hook for methods whose clients differ."""

    def begin(self, arrays: Arrays) -> Arrays:
        """Turn arrays that came into those that are trained; the same by default."""
        return arrays

    def finish(self, arrays: Arrays) -> Arrays:
        """Turn arrays that were trained into those that leave; the same by default."""
        return arrays

    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the model on ``input_ids`` and ``attention_mask`` (absent: nothing is padded) and return its logits."""
        mask = batch.get("attention_mask")
        if mask is not None and not self.head:
            mask = None  # a causal model's tokens never see the padding on their right
        if mask is not None and not isinstance(self.model, MeanPoolingClassifier):
            mask = unhurried_mask(self.model, mask)
        with sdpa_kernel(_ATTENTION):
            output: Any = self.model(input_ids=batch["input_ids"], attention_mask=mask)
        logits: torch.Tensor = output.logits
        return logits


def adapt_linear(model: nn.Module, config: Config, kind: str) -> AdaptedModel:
    """Put adapters and a stacked head into a frozen base model, in place.

    Parameters
    ----------
    model : torch.nn.Module
        From :func:`fedlora.models.load_base`; frozen.
    config : Config
        ``method.rank``, ``method.alpha``, ``method.target_modules`` and ``method.dropout`` are used.
    kind : str
        The parameterisation: a key of ``PARAMETERISATIONS``.

    Returns
    -------
    AdaptedModel
        All factors zero and the head as loaded; nothing trained yet.

    Raises
    ------
    InputError
        If no module matches, a matched module is no linear layer, or the rank is above a layer's size.
    """
    layout = RowLayout()
    never_cache(model)
    head = head_of(model)
    inside_head = f"{head[0]}." if head else None
    paths = target_paths(model, config.method.target_modules, exclude=head[0] if head else None)
    adapters: dict[str, FactoredLinear] = {}
    for path in paths:
        base = model.get_submodule(path)
        out_features, in_features = linear_shape(base)
        largest = min(out_features, in_features)
        if config.method.rank > largest:
            remedy = f"is above the size of {path} ({out_features} x {in_features}); use {largest} or less"
            raise InputError("method.rank", config.method.rank, remedy)
        shapes = PARAMETERISATIONS[kind].factor_shapes(out_features, in_features, config.method.rank)
        adapters[path] = FactoredLinear(base, shapes, config.scaling(), layout, config.method.dropout)
    for path, adapter in adapters.items():
        model.set_submodule(path, adapter)
    layers: dict[str, StackedLinear] = {}
    if head:
        linears = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)]
        for path, linear in linears:
            if path == head[0] or path.startswith(str(inside_head)):
                layers[path] = _stacked_copy(linear, layout)
                model.set_submodule(path, layers[path])
    return AdaptedModel(model, layout, kind, adapters, layers)


def never_cache(model: nn.Module) -> None:
    """Switch the cache of keys and values off: nothing is generated here, and it would only copy them."""
    for module in model.modules():
        base_config: Any = getattr(module, "config", None)
        if getattr(base_config, "use_cache", False):
            base_config.use_cache = False


def _stacked_copy(linear: nn.Linear, layout: RowLayout) -> StackedLinear:
    weight = linear.weight.detach()
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    stacked = StackedLinear(
        linear.in_features, linear.out_features, layout, linear.bias is not None, dtype, weight.device
    )
    stacked.weight = nn.Parameter(weight.to(dtype)[None].clone(), requires_grad=False)
    if linear.bias is not None:
        stacked.bias = nn.Parameter(linear.bias.detach().to(dtype)[None].clone(), requires_grad=False)
    return stacked


def target_paths(model: nn.Module, targets: str | Sequence[str] | None, exclude: str | None = None) -> list[str]:
    """Choose the modules to adapt, as PEFT does.

    Parameters
    ----------
    model : torch.nn.Module
    targets : str, sequence of str or None
        A regular expression for whole paths, ``all-linear``, a list of names (a path or its end), or None for PEFT's
        default for the model type (query and value).
    exclude : str, optional
        Path of the head, which is trained in full instead.

    Raises
    ------
    InputError
        If nothing matches, or a match is neither a Linear nor a Conv1D layer, or shares its weight with the embeddings.
    """
    field = "method.target_modules"
    if targets is None:
        model_type = _model_type(model)
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if targets is None:
            raise InputError(field, None, f'has no default for a {model_type} model; name the modules, or "all-linear"')
    modules = {
        path: module
        for path, module in model.named_modules()
        if path and not (exclude and (path == exclude or path.startswith(f"{exclude}.")))
    }
    linear = (nn.Linear, Conv1D)
    if targets == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        found = [p for p, m in modules.items() if isinstance(m, linear) and m is not output]
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(field, targets, f"is not a regular expression ({error})") from None
        # Paths are those of the stock model, around which a mean-pooling classifier is wrapped.
        wrapper = "encoder." if isinstance(model, MeanPoolingClassifier) else ""
        found = [p for p in modules if pattern.fullmatch(p) or pattern.fullmatch(p.removeprefix(wrapper))]
    else:
        found = [p for p in modules if any(p == name or p.endswith(f".{name}") for name in targets)]
    if not found:
        names = sorted({p.rpartition(".")[2] for p, m in modules.items() if isinstance(m, linear)})
        raise InputError(field, targets, f"matches no module of the model; its linear layers are {', '.join(names)}")
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    for path in found:
        if not isinstance(modules[path], linear):
            kind = type(modules[path]).__name__
            raise InputError(field, targets, f"matches {path}, a {kind}; only Linear and Conv1D layers take adapters")
        if modules[path].weight is getattr(embeddings, "weight", None):
            remedy = f"matches {path}, whose weight is the embeddings' too, so it could not be merged; leave it out"
            raise InputError(field, targets, remedy)
    return found


def _model_type(model: nn.Module) -> str:
    """Name the base's architecture; a mean-pooled classifier's base is inside it."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    kinds = [str(config.model_type) for config in configs if getattr(config, "model_type", "")]
    known = [kind for kind in kinds if kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING]
    return (known or kinds or [type(model).__name__])[0]
