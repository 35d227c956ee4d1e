"""Evaluation by client agrees with evaluating every client's examples alone."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.data.tokens import TokenTable
from fedlora.training import evaluate, evaluate_clients
from tests.tiny import adapted_model, settings, table


def part(whole: TokenTable, rows: np.ndarray) -> TokenTable:
    """The rows of a table as a table."""
    tokens = [whole.tokens[whole.offsets[row] : whole.offsets[row + 1]] for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])])
    labels = None if whole.labels is None else whole.labels[rows]
    starts = None if whole.answer_start is None else whole.answer_start[rows]
    return TokenTable(np.concatenate(tokens), offsets, labels, starts, None, whole.pad_token_id, whole.task)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_clients_are_evaluated_on_their_own_examples(kind: str) -> None:
    config = settings(kind)
    adapted, examples = adapted_model(kind, config), table(kind, 30)
    # Neither in order nor all of them.
    partition = [np.array([7, 3, 29]), np.array([0]), np.array([11, 12, 1, 20, 5])]
    rows = evaluate_clients(adapted, examples, partition, 4)
    assert [(row["client"], row["examples"]) for row in rows] == [(0, 3), (1, 1), (2, 5)]
    for row, members in zip(rows, partition, strict=True):
        alone = evaluate(adapted, part(examples, members), 2)
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert row.get("accuracy") == alone.get("accuracy")
    assert len({row["loss"] for row in rows}) == 3
