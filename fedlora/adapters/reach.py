"""Whether an adapter in a module would do anything, measured by running the model on a few tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fedlora.models import SHORT_TEXTS, on_skeleton, run_short_text

NEVER_CALLED = "its forward is never called"
READ_ELSEWHERE = "other code reads its weight, past an adapter"
NO_INFLUENCE = "the logits do not depend on it"
OTHER_ROWS = "it sees the tokens of all texts in one row after the other, so whose they are is lost"


def unreached(model: nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """Say in which modules an adapter would do nothing, or only part of what it should.

    An adapter takes a layer's place: it works where the layer is called and its output reaches the logits. Code that
    computes with the layer's weight itself, as Mamba's and torch's own attention do, would go past it.

    Parameters
    ----------
    model : torch.nn.Module
        From :func:`fedlora.models.load_base`; a skeleton without weights will do.
    paths : sequence of str
        Linear layers.

    Returns
    -------
    dict of str to str
        Path to the reason.

    Raises
    ------
    InputError
        If the model cannot run on a short text.
    """
    layers = {path: model.get_submodule(path) for path in paths}
    training = [(module, module.training) for module in model.modules()]
    try:
        called, by_text, influential, read = on_skeleton(model, lambda: _watch(model, layers), tuple(paths))
    finally:
        for module, mode in training:
            module.training = mode
    reasons = {}
    for path in paths:
        if path in read:
            reasons[path] = READ_ELSEWHERE
        elif path not in called and not _is_unchosen_sibling(path, called):
            reasons[path] = NEVER_CALLED
        elif path in called and path not in by_text:
            reasons[path] = OTHER_ROWS
        elif path in called and path not in influential:
            reasons[path] = NO_INFLUENCE
    return reasons


def _watch(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[set[str], set[str], set[str], set[str]]:
    """Return which layers are called, called for each text by itself, influential, and read by other code."""
    with _watched(layers) as watch, torch.enable_grad():
        # Some models compute otherwise while they train.
        for mode in (False, True):
            model.train(mode)
            watch.see(run_short_text(model).logits)
    return watch.called, watch.by_text, watch.influential, watch.read


def _is_unchosen_sibling(path: str, called: set[str]) -> bool:
    """Whether tokens went to another of its siblings, in a list inside a layer."""
    if len(re.findall(r"\.\d+(?=\.)", path)) < 2:
        return False
    before, after = re.fullmatch(r"(.*)\.\d+(\..*)", path).groups()  # type: ignore[union-attr]
    pattern = re.compile(rf"{re.escape(before)}\.\d+{re.escape(after)}")
    return any(pattern.fullmatch(other) for other in called)


class _Watch(TorchFunctionMode):
    """Notes which layers are called, whose outputs reach the logits, and whose weights others compute with."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.by_text: set[str] = set()
        self.influential: set[str] = set()
        self.read: set[str] = set()
        self._weights = {id(p): path for path, layer in layers.items() for p in layer.parameters()}
        self._inside: list[str] = []
        self._leaves: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Asking for a dtype or a shape gives no tensor, and making a tensor of the same kind reads no number.
        if isinstance(result, torch.Tensor | tuple | list) and not _makes_alike(func):
            for tensor in _tensors([*args, *(kwargs or {}).values()]):
                path = self._weights.get(id(tensor))
                if path is not None and path not in self._inside:
                    self.read.add(path)
        return result

    def enter(self, path: str, x: torch.Tensor | None = None) -> None:
        self._inside.append(path)
        # A single row that the batch shares is given to each text as its own.
        if x is None or len(x) in (1, SHORT_TEXTS):
            self.by_text.add(path)

    def leave(self, path: str, output: torch.Tensor) -> torch.Tensor:
        self._inside.remove(path)
        self.called.add(path)
        if path not in self._leaves:
            self._leaves[path] = torch.zeros_like(output[(0,) * (output.dim() - 1)]).requires_grad_()
        return output + self._leaves[path]

    def see(self, logits: torch.Tensor) -> None:
        """Note from which layers' outputs these logits were computed."""
        leaves, self._leaves = self._leaves, {}
        # The graph alone says it: on fake tensors a backward pass takes as long as the forward pass.
        behind = _leaves_behind(logits)
        self.influential |= {path for path, leaf in leaves.items() if id(leaf) in behind}


@contextmanager
def _watched(layers: dict[str, nn.Module]) -> Iterator[_Watch]:
    watch = _Watch(layers)
    hooks: list[Any] = []
    for path, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda module, args, path=path: watch.enter(path, *args)))
        hooks.append(layer.register_forward_hook(lambda module, args, output, path=path: watch.leave(path, output)))
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _leaves_behind(tensor: torch.Tensor) -> set[int]:
    """Return the ids of the leaves that autograd would lead a tensor's gradient back to."""
    found, seen, left = set(), set(), [tensor.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        left += [before for before, _ in node.next_functions]
    return found


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _makes_alike(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith("new_") or name.endswith("_like")
