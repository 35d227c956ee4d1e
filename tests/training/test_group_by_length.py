"""Physical batches of examples of like length: fewer tokens, the same steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.config import unused_keys
from fedlora.data.tokens import TokenTable
from fedlora.training import ClientResult, train_cohort
from tests import tiny

SIZES = [12, 2, 9]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_steps_are_those_of_whole_batches(kind: str, private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny.table(kind, sum(SIZES), length=14)
    tokens: list[int] = []
    batch = TokenTable.batch

    def counted(self: TokenTable, rows: np.ndarray, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        found = batch(self, rows, device)
        tokens.append(found["input_ids"].numel())
        return found

    monkeypatch.setattr(TokenTable, "batch", counted)

    def trained(**client: Any) -> tuple[list[ClientResult], int]:
        given = {"batch_size": 8, "local_steps": 3, "optimizer": "sgd", **client}
        config = tiny.settings(kind, client=given)
        adapted = tiny.adapted_model(kind, config)
        start = adapted.arrays(tiny.trained_names(adapted, config))
        plans = [tiny.plan(0.5, 0.1, 0.7, 4.0)] * len(SIZES) if private else None
        jobs = tiny.jobs_of([start] * len(SIZES), tiny.split(SIZES), plans)
        tokens.clear()
        return train_cohort(adapted, table, jobs, config), sum(tokens)

    whole, _ = trained()
    plain, before = trained(physical_batch_size=3)
    grouped, after = trained(physical_batch_size=3, group_by_length=True)
    assert after < before
    for results in (plain, grouped):
        for result, other in zip(results, whole, strict=True):
            assert tiny.difference(result.arrays, other.arrays) < 1e-6
            assert result.loss == tiny.same_loss(other.loss)


def test_without_physical_batches_there_is_nothing_to_group() -> None:
    def notes(gpus: int = 0, **client: Any) -> list[str]:
        simulation = {"gpus_per_worker": gpus}
        config = tiny.settings("bert", client={"group_by_length": True, **client}, simulation=simulation)
        return [note for note in unused_keys(config) if "group_by_length" in note]

    assert len(notes()) == 1
    assert not notes(physical_batch_size=2)
    assert not notes(gpus=1)  # which may split them
