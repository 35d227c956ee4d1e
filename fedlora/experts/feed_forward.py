"""Where a transformer's feed-forward blocks are, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.errors import InputError
from fedlora.models import linear_shape

GATED = (("gate_proj", "up_proj", "down_proj"),)
"""Names of gate, up and down in Llama and its many relatives."""

UNGATED = (
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("up_proj", "down_proj"),
)
"""Names of up and down in the GPTs, Phi and others."""

_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block of a model.

    Attributes
    ----------
    path : str
        Of the module that holds it; its router is named after it.
    place : str
        The module that a block of experts replaces.
    emptied : str or None
        A module that the replacement makes the identity (BERT's output layer, which follows after the block).
    projections : dict of str to str
        ``gate`` (gated blocks only), ``up`` and ``down`` to module paths.
    activation : callable
    """

    path: str
    place: str
    emptied: str | None
    projections: dict[str, str]
    activation: Callable[[torch.Tensor], torch.Tensor]

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Return (outputs, inputs) by projection, of a model in which nothing is replaced yet."""
        return {role: linear_shape(model.get_submodule(path)) for role, path in self.projections.items()}


class Block(Protocol):
    """What replaces a feed-forward block: it still knows the public projections and their (outputs, inputs)."""

    shapes: dict[str, tuple[int, int]]

    def public(self, role: str) -> nn.Module:
        """Return the public model's layer of a projection."""


class ExpertShapes:
    """Shapes of the experts in a model, for classes that hold its feed-forward blocks and their replacements.

    Attributes
    ----------
    forms : list of FeedForward
    blocks : list of Block
        One for each form.
    """

    forms: list[FeedForward]
    blocks: Sequence[Block]

    def projections(self) -> dict[str, tuple[int, int]]:
        """Module path to (outputs, inputs) of everything that an expert updates."""
        pairs = zip(self.forms, self.blocks, strict=True)
        return {path: block.shapes[role] for form, block in pairs for role, path in form.projections.items()}

    def routers(self) -> dict[str, int]:
        """Block path to the router's number of inputs."""
        return {form.path: block.shapes["up"][1] for form, block in zip(self.forms, self.blocks, strict=True)}


def find_feed_forwards(model: nn.Module) -> list[FeedForward]:
    """Find the feed-forward blocks of a transformer, in the order of its layers.

    Raises
    ------
    InputError
        If there is none of a known form.
    """
    forms = [form for path, module in model.named_modules() if (form := _form(path, module)) is not None]
    found = [form for form in forms if _is_all_of(form, model)]
    if not found:
        remedy = "its feed-forward layers have no known form (gate/up/down or two linear layers); choose another model"
        raise InputError("model.name", getattr(getattr(model, "config", None), "model_type", "?"), remedy)
    return found


def _form(path: str, module: nn.Module) -> FeedForward | None:
    children = dict(module.named_children())
    linear = {name for name, child in children.items() if isinstance(child, nn.Linear | Conv1D)}
    others = [child for name, child in children.items() if name not in linear]
    if linear and not any(True for child in others for _ in child.parameters()):
        names = next((names for names in (*GATED, *UNGATED) if set(names) == linear), None)
        act = next((a for a in _ACTIVATIONS if callable(getattr(module, a, None))), None)
        if names is not None and act is not None:
            roles = ("gate", "up", "down")[-len(names) :]
            paths = {role: f"{path}.{name}" for role, name in zip(roles, names, strict=True)}
            return FeedForward(path, path, None, paths, getattr(module, act))
    inner, outer = children.get("intermediate"), children.get("output")
    if inner is not None and outer is not None and hasattr(inner, "intermediate_act_fn") and hasattr(outer, "dense"):
        paths = {"up": f"{path}.intermediate.dense", "down": f"{path}.output.dense"}
        act_fn: Callable[[torch.Tensor], torch.Tensor] = inner.intermediate_act_fn  # type: ignore[assignment]
        return FeedForward(path, f"{path}.intermediate", f"{path}.output.dense", paths, act_fn)
    return None


@torch.no_grad()
def _is_all_of(form: FeedForward, model: nn.Module) -> bool:
    """Whether a block computes down(act(gate(x)) up(x)) and no more, as its experts will; tried on one token.

    Names do not tell: some blocks of these forms normalise first, drop small activations, or take a residual.
    """
    module = model.get_submodule(form.place)
    layers = {role: model.get_submodule(path) for role, path in form.projections.items()}
    weight: torch.Tensor = layers["up"].weight  # type: ignore[assignment]
    x = torch.linspace(-1, 1, linear_shape(layers["up"])[1], dtype=weight.dtype, device=weight.device)[None, None]
    training = module.training
    module.eval()  # without dropout
    try:
        stock: torch.Tensor = module(x)
    except TypeError:
        return False
    finally:
        module.train(training)
    if form.emptied is not None:
        stock = layers["down"](stock)
    up = layers["up"](x)
    own = layers["down"](form.activation(layers["gate"](x)) * up if "gate" in layers else form.activation(up))
    return own.is_meta or bool((stock - own).norm() <= 1e-2 * stock.norm())


def replace(model: nn.Module, form: FeedForward, block: nn.Module) -> None:
    """Put a block of experts in a feed-forward block's place."""
    model.set_submodule(form.place, block)
    if form.emptied is not None:
        model.set_submodule(form.emptied, nn.Identity())


def public_digest(model: nn.Module, forms: list[FeedForward]) -> str:
    """SHA-256 of every weight of the public model under its stock name, also of one whose blocks are replaced.

    Two owners' experts fit together only where these are equal.
    """
    sha = hashlib.sha256()
    for name, weight in sorted(_public_weights(model, forms)):
        value = weight.detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # As bytes: numpy has no bfloat16.
        sha.update(value.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _public_weights(model: nn.Module, forms: list[FeedForward]) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = {form.place: form for form in forms}
    replaced = tuple(f"{place}." for place in blocks if hasattr(model.get_submodule(place), "public"))
    for name, weight in model.named_parameters():
        if not name.startswith(replaced):
            yield name, weight
    for place, form in blocks.items():
        if f"{place}." in replaced:
            block: Block = model.get_submodule(place)  # type: ignore[assignment]
            for role, path in form.projections.items():
                for name, weight in block.public(role).named_parameters():
                    yield f"{path}.{name}", weight
