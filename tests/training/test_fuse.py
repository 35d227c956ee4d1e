"""Which modules torch.compile would fuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fedlora.adapters import FactoredLinear, StackedLinear
from fedlora.data.tokens import FederatedData, Partition
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


@pytest.mark.parametrize(("chosen", "rounds"), [(True, 1), (False, 100_000), ("auto", 1), ("auto", 1000)])
def test_long_runs_are_fused(chosen: Any, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained: Any = tiny.base_model("bert").config
    monkeypatch.setattr(fuse, "model_config", lambda _: pretrained)
    config = tiny.settings("bert", simulation={"compile": chosen, "gpus_per_worker": 1.0}, run={"rounds": rounds})
    table, rows = tiny.table("bert", 9), Partition(np.arange(9), np.array([0, 9]))
    data = FederatedData(table, table, None, None, ["a", "b"], [], rows, ["0"], Path())
    steps = 100 * fuse.run_steps(config, 9) / rounds
    work = 4 * fuse._frozen_numbers(pretrained) * float(table.lengths.mean()) * config.client.batch_size
    monkeypatch.setattr(fuse, "LONG", work * steps / fuse.RATE)  # what a hundred rounds take
    assert fuse.compiles(config, data) is (chosen if chosen != "auto" else rounds > 100)


def test_without_a_gpu_nothing_is_fused() -> None:
    assert not fuse.compiles(tiny.settings("bert", run={"rounds": 100_000}), None)  # type: ignore[arg-type]


def test_the_numbers_of_a_model_are_about_its_parameters() -> None:
    for kind in ("bert", "llama"):
        model: Any = tiny.base_model(kind)
        matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        assert fuse._frozen_numbers(model.config) == pytest.approx(matrices, rel=0.3)
