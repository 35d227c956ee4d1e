"""Whether pairs are independent is measured with their token types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlora.data.tokens import AnyText, TokenTable
from fedlora.training import train_cohort
from fedlora.training.soundness import dependence
from tests import tiny

PAIR = {"text_pair": "other"}


def mixing_types(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Give all rows of a batch the token types of its first."""
    types = options.get("token_type_ids")
    if types is not None:
        options["token_type_ids"] = types[:1].expand_as(types)
    return arguments, options


@pytest.mark.parametrize("kind", ["bert", "mean"])
def test_a_model_that_mixes_token_types_is_refused_for_pairs(kind: str) -> None:
    for data, mixes, refused in ((PAIR, True, True), (PAIR, False, False), ({}, True, False)):
        config = tiny.settings(kind, data=data)
        adapted = tiny.adapted_model(kind, config)
        if mixes:
            adapted.model.register_forward_pre_hook(mixing_types, with_kwargs=True)
        assert (dependence(adapted, config, 0) is not None) == refused


@pytest.mark.parametrize("private", [False, True])
def test_clients_with_pairs_train_in_a_cohort_as_alone(private: bool) -> None:
    config = tiny.settings("bert", data=PAIR, client={"local_steps": 3})
    one = tiny.table("bert", 12)
    rng = np.random.default_rng(0)
    types = rng.integers(0, 2, len(one.tokens))
    table = TokenTable(one.tokens, one.offsets, one.labels, None, None, 0, one.task, one.label_names, token_types=types)
    adapted = tiny.adapted_model("bert", config)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    plans = [tiny.plan(1.0)] * 2 if private else None
    jobs = tiny.jobs_of([start] * 2, tiny.split([5, 7]), plans)
    together = train_cohort(adapted, table, jobs, config)
    for job, result in zip(jobs, together, strict=True):
        (alone,) = train_cohort(adapted, table, [job], config)
        assert tiny.difference(alone.arrays, result.arrays) < 1e-4
        (without,) = train_cohort(adapted, one, [job], config)
        assert tiny.difference(without.arrays, result.arrays) > 1e-4


class Failing:
    """A tokenizer that fails on one text, and gives an id that the model lacks for another."""

    pad_token_id, eos_token_id, cls_token_id, unk_token_id, name_or_path = 0, 2, 1, None, "failing"

    def __call__(self, texts: list[str], text_pair: list[str] | None = None, **options: Any) -> dict[str, Any]:
        """Give a token a character, of type 1 in the second text."""
        if any("!" in text for text in texts):
            raise RuntimeError
        pairs = text_pair or [""] * len(texts)
        rows = [[99 if c == "?" else 5 for c in a + b] for a, b in zip(texts, pairs, strict=True)]
        found: dict[str, Any] = {"input_ids": rows}
        if options.get("return_token_type_ids"):
            found["token_type_ids"] = [[0] * len(a) + [1] * len(b) for a, b in zip(texts, pairs, strict=True)]
        return found


@pytest.mark.parametrize("bad", ["!", "?"])
def test_a_nodes_pair_that_cannot_be_read_is_one_special_token(bad: str) -> None:
    tokenizer = AnyText(Failing(), 50)
    found = tokenizer(["ab", f"{bad}cd", ""], text_pair=["c", "d", ""], return_token_type_ids=True)
    assert found == {"input_ids": [[5, 5, 5], [2], [2]], "token_type_ids": [[0, 0, 1], [0], [0]]}
