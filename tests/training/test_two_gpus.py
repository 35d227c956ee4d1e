"""What only two GPUs show: a split model gives the numbers of one card, and processes of a card use one base."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedlora import simulate
from fedlora.devices import devices_of, move_inputs, split_by_layers
from fedlora.kernels import use_kernels
from fedlora.shared_base import lend
from fedlora.training import evaluate
from fedlora.training.answering import generate
from tests import tiny
from tests.training.test_split import WAYS, made, trained

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

CARDS = [torch.device("cuda", number) for number in range(2)]


def placed(kind: str, cards: list[torch.device]) -> nn.Module:
    """Put a tiny model on cards."""
    base = tiny.base_model(kind)
    if len(cards) == 1:
        return base.to(cards[0])
    for path, card in split_by_layers(base, cards).items():
        base.get_submodule(path).to(card)
    return move_inputs(base)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_training_is_that_of_one_card(kind: str, way: dict[str, Any]) -> None:
    causal, sections = kind in tiny.CAUSAL, {"private": False, **way}
    sections["client"] = {**sections.get("client", {}), "optimizer": "sgd"}  # AdamW would enlarge rounding near 0
    one, two = (trained(placed(kind, cards), causal, None, **sections) for cards in (CARDS[:1], CARDS))
    for result, other in zip(two, one, strict=True):
        assert tiny.difference(result.arrays, other.arrays) < 1e-5
        assert result.loss == tiny.same_loss(other.loss, 1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_kernels_run_on_the_card_of_their_layer(kind: str) -> None:
    """In bfloat16, which they carry; on the other card's stream they would race with what comes before them."""
    causal, losses = kind in tiny.CAUSAL, []
    for cards in (CARDS[:1], CARDS):
        base: Any = placed(kind, cards).bfloat16()
        use_kernels(base)
        results = [trained(base, causal, None, private=True) for _ in range(5)]
        losses.append([result.loss for result in results[0]])
        for again in results[1:]:
            assert [result.loss for result in again] == losses[-1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_evaluation_and_answers_are_those_of_one_card(kind: str) -> None:
    causal, found = kind in tiny.CAUSAL, []
    for cards in (CARDS[:1], CARDS):
        adapted, _ = made(placed(kind, cards), causal)
        assert devices_of(adapted.model) == cards
        answers = generate(adapted, [[5, 6, 7], [8, 9]], 5, 2, stop=[2], pad_token_id=0) if causal else []
        found.append((evaluate(adapted, tiny.table("llama" if causal else "bert", 9), 4)["loss"], answers))
    assert found[0][0] == tiny.same_loss(found[1][0], 1e-5)
    assert found[0][1] == found[1][1]


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "texts.jsonl").write_text('{"text": "w4 w5 w6 w7"}\n' * 24)
    return {
        "run": {"rounds": 2},
        "model": {"name": str(tiny.save_llama(tmp_path / "llama")), "task": "causal-lm", "max_length": 8},
        "data": {"name": str(tmp_path / "texts.jsonl"), "partition": {"clients": 2}},
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 2, "local_steps": 2, "optimizer": "sgd"},
        "privacy": {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-2},
    }


@pytest.mark.parametrize("places", [(0, 2), (1, 2), (1, 1), (2, 1), (2, 0.5)], ids=str)
def test_a_run_is_that_of_one_card(content: dict[str, Any], places: tuple[int, float], tmp_path: Path) -> None:
    losses = []
    for number, (workers, gpus) in enumerate([(0, 1), places]):
        content["simulation"] = {"workers": workers, "gpus_per_worker": gpus}
        result = simulate(content, output=tmp_path / f"run{number}")
        losses.append(result.summary["final"]["loss"])
        log = (tmp_path / f"run{number}" / "run.log").read_text()
        assert "loaded again" not in log
        assert "cannot lend" not in log
    assert losses[1] == tiny.same_loss(losses[0], 1e-5)


def test_what_a_grid_lent_is_freed_at_its_end(content: dict[str, Any], tmp_path: Path) -> None:
    content["simulation"] = {"workers": 1, "gpus_per_worker": 1.0}
    simulate(content, output=tmp_path / "run")
    gc.collect()
    assert not lend()
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated(0) < 2**20
