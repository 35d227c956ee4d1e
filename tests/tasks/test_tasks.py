"""One loss an example, and what evaluation makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedlora.data.tokens import TokenTable
from fedlora.tasks import get_task
from fedlora.tasks.causal_lm import token_losses
from fedlora.training import evaluate
from tests import tiny


def test_an_examples_loss_is_the_mean_over_its_own_targets():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 3, -100, -100], [2, -100, -100, -100, -100]])
    losses = get_task("causal-lm").loss(logits, labels)
    first = functional.cross_entropy(logits[0, :4], labels[0, 1:])
    second = functional.cross_entropy(logits[1, 1:2], labels[1, 2:3])
    # The third has no target: its only label is on the first token, which nothing predicts.
    torch.testing.assert_close(losses, torch.stack([first, second, torch.zeros((), dtype=torch.float64)]))
    sums, counts = token_losses(logits, labels)
    assert counts.tolist() == [4, 1, 0]
    torch.testing.assert_close(sums, losses * counts)
    # Neighbours do not matter.
    torch.testing.assert_close(get_task("causal-lm").loss(logits[1:2], labels[1:2])[0], losses[1])


def test_no_target_at_all_is_no_loss_and_no_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    losses = get_task("causal-lm").loss(logits, torch.full((2, 3), -100))
    assert losses.tolist() == [0, 0]
    losses.sum().backward()
    assert not logits.grad.any()


def test_half_precision_logits_are_compared_in_single_precision():
    logits = torch.randn(4, 9, dtype=torch.bfloat16)
    labels = torch.arange(4)
    losses = get_task("sequence-classification").loss(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, functional.cross_entropy(logits.float(), labels, reduction="none"))


@pytest.mark.parametrize("kind", ["bert", "mean", "llama", "gpt2"])
def test_evaluation_does_not_depend_on_batches(kind):
    adapted = tiny.adapted_model(kind, tiny.settings(kind), torch.float64)
    examples = tiny.table(kind, 23)
    whole = evaluate(adapted, examples, 23)
    for size in (1, 4, 100):
        assert evaluate(adapted, examples, size) == pytest.approx(whole, rel=1e-6)
    assert not adapted.model.training
    batch = examples.batch(np.arange(23))
    adapted.layout.set_rows([23])
    with torch.no_grad():
        logits = adapted.logits(batch)
    if kind in tiny.CAUSAL:
        sums, counts = token_losses(logits, batch["labels"])
        # The loss of a language model is over all tokens, long examples weighing more.
        assert whole["loss"] == pytest.approx(float(sums.sum() / counts.sum()))
        assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
    else:
        assert whole["loss"] == pytest.approx(float(functional.cross_entropy(logits, batch["labels"])))
        assert whole["accuracy"] == pytest.approx(float((logits.argmax(1) == batch["labels"]).double().mean()))


def test_perplexity_by_domain():
    adapted = tiny.adapted_model("llama", tiny.settings("llama"), torch.float64)
    table = tiny.table("llama", 9)
    domain = np.array([0, 1, 1, 0, 2, 2, 2, 0, 1])
    with_domain = TokenTable(table.tokens, table.offsets, None, table.answer_start, domain, 0, table.task)
    scores = evaluate(adapted, with_domain, 4, ["a", "b", "c", "unseen"])["by_domain"]
    assert list(scores) == ["a", "b", "c"]
    for number, name in enumerate("abc"):
        rows = np.flatnonzero(domain == number)
        lengths = table.lengths[rows]
        tokens = np.concatenate([table.tokens[table.offsets[r] : table.offsets[r + 1]] for r in rows])
        own = TokenTable(
            tokens, np.concatenate([[0], np.cumsum(lengths)]), None, table.answer_start[rows], None, 0, table.task
        )
        assert scores[name] == pytest.approx(evaluate(adapted, own, 2)["perplexity"])


def test_classification_metrics():
    labels, predictions = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 3])
    task = get_task("sequence-classification")
    found = task.statistics(functional.one_hot(predictions, 5).double(), labels, list("abcde"))
    metrics = task.metrics({name: value.numpy().sum(0) for name, value in found.items()})
    # F1: class 0 4/5, class 1 2/3, classes 2 and 3 nothing; class 4 does not occur.
    del metrics["loss"]
    assert metrics == pytest.approx({"accuracy": 0.6, "macro_f1": (0.8 + 2 / 3) / 4, "majority": 0.6})
