"""Which modules torch.compile would fuse."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fedlora.adapters import FactoredLinear, StackedLinear
from fedlora.training import fuse
from tests import tiny


@pytest.mark.parametrize("kind", ["bert", "mean", "llama"])
def test_islands_hold_no_adapter_and_do_not_overlap(kind: str) -> None:
    adapted = tiny.adapted_model(kind, tiny.settings(kind))
    islands = fuse._islands(adapted.model)
    inside = [id(m) for island in islands for m in island.modules()]
    assert len(inside) == len(set(inside))
    assert not any(isinstance(m, FactoredLinear | StackedLinear) for island in islands for m in island.modules())
    # Every frozen normalisation and activation is in one of them.
    norms = [m for m in adapted.model.modules() if "Norm" in type(m).__name__ and any(True for _ in m.parameters())]
    assert norms
    assert {id(m) for m in norms} <= set(inside)


def test_on_the_cpu_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    assert fuse.fuse_blocks(tiny.adapted_model("bert", tiny.settings("bert"))) == 0
    assert not compiled


def test_transformer_layers_are_the_longest_list() -> None:
    adapted = tiny.adapted_model("llama", tiny.settings("llama"))
    layers = fuse._layers(adapted.model)
    assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * len(layers)
    assert len(layers) == adapted.model.config.num_hidden_layers  # type: ignore[union-attr]
