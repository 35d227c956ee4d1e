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
from fedlora.tasks.token_classification import entities, first_tokens
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


def totals(found: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Sum what examples add to an evaluation."""
    return {name: value.double().numpy().sum(0) for name, value in found.items()}


LABELS = {
    "sequence-classification": lambda rng, n: torch.from_numpy(rng.integers(0, 4, n)),
    "multi-label-classification": lambda rng, n: torch.from_numpy(rng.integers(0, 2, (n, 4)).astype(np.float32)),
    "regression": lambda rng, n: torch.from_numpy(rng.normal(3, 2, n).astype(np.float32)),
    "token-classification": lambda rng, n: torch.from_numpy(
        np.where(rng.random((n, 6)) < 0.3, -100, rng.integers(0, 4, (n, 6)))
    ),
    "causal-lm": lambda rng, n: torch.from_numpy(np.where(rng.random((n, 6)) < 0.3, -100, rng.integers(0, 4, (n, 6)))),
}


def drawn(name: str, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits and labels of n examples."""
    rng = np.random.default_rng(seed)
    shape = {"regression": (n, 1), "token-classification": (n, 6, 4), "causal-lm": (n, 6, 4)}.get(name, (n, 4))
    return torch.from_numpy(rng.normal(size=shape)), LABELS[name](rng, n)


@pytest.mark.parametrize("name", LABELS)
def test_an_examples_loss_is_its_own(name):
    task = get_task(name)
    logits, labels = drawn(name, 9)
    logits.requires_grad_()
    losses = task.loss(logits, labels)
    assert losses.shape == (9,)
    for row in range(9):
        torch.testing.assert_close(task.loss(logits[row : row + 1], labels[row : row + 1])[0], losses[row])
    losses[3].backward()
    assert logits.grad[3].any()
    assert not logits.grad[[0, 1, 2, 4, 5, 6, 7, 8]].any()


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("names", [["B-X", "I-X", "O", "B-Y"], ["a", "b", "c", "d"]])
def test_sums_of_parts_are_all_that_metrics_need(name, names):
    task = get_task(name)
    logits, labels = drawn(name, 20)
    whole = task.statistics(logits, labels, names)
    parts = [task.statistics(logits[rows], labels[rows], names) for rows in (slice(0, 7), slice(7, 8), slice(8, 20))]
    together = {key: sum(totals(part)[key] for part in parts) for key in whole}
    assert task.metrics(together) == pytest.approx(task.metrics(totals(whole)))
    assert set(task.metrics(together)) - {"loss"} <= set(task.scores)
    # A client without examples has metrics too.
    assert all(
        math.isfinite(value) for value in task.metrics(totals(task.statistics(logits[:0], labels[:0], names))).values()
    )


def test_regression_metrics_are_those_of_scipy_and_numpy():
    from scipy import stats

    task = get_task("regression")
    logits, labels = drawn("regression", 50)
    found = task.statistics(logits, labels, None)
    metrics = task.metrics(totals(found), {name: value.numpy() for name, value in found.items()})
    x, y = logits[:, 0].numpy(), labels.double().numpy()
    expected = {
        "loss": np.mean((x - y) ** 2),
        "mae": np.mean(abs(x - y)),
        "r2": 1 - np.sum((x - y) ** 2) / np.sum((y - y.mean()) ** 2),
        "pearson": np.corrcoef(x, y)[0, 1],
        "spearman": stats.spearmanr(x, y).statistic,
    }
    assert metrics == pytest.approx(expected)
    assert "spearman" not in task.metrics(totals(found))


@pytest.mark.parametrize("constant", ["prediction", "label"])
def test_a_correlation_with_a_constant_is_zero(constant):
    task = get_task("regression")
    logits, labels = drawn("regression", 5)
    if constant == "prediction":
        logits = torch.full_like(logits, 0.1)
    else:
        labels = torch.full_like(labels, 0.1)
    found = task.statistics(logits, labels, None)
    metrics = task.metrics(totals(found), {name: value.numpy() for name, value in found.items()})
    assert (metrics["pearson"], metrics["spearman"]) == (0, 0)
    assert math.isfinite(metrics["r2"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite_have_no_correlation(value):
    task = get_task("regression")
    logits, labels = drawn("regression", 5)
    logits[2] = value
    found = task.statistics(logits, labels, None)
    with np.errstate(invalid="ignore"):
        metrics = task.metrics(totals(found), {name: value.numpy() for name, value in found.items()})
    assert math.isnan(metrics["pearson"])
    assert task.score(metrics) == -math.inf


def test_multi_label_metrics():
    task = get_task("multi-label-classification")
    labels = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    logits = torch.tensor([[2.0, -1, -1], [1, -1, -1], [-1, 3, -1]])
    metrics = task.metrics(totals(task.statistics(logits, labels, ["a", "b", "c"])))
    # a: 2 of 2; b: none, one wrong, one missed; c: never occurs. In all 2 hits, 3 predictions, 3 labels.
    assert metrics["micro_f1"] == pytest.approx(4 / 6)
    assert metrics["macro_f1"] == pytest.approx(1 / 3)
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    mean = functional.binary_cross_entropy_with_logits(logits, labels)
    assert metrics["loss"] == pytest.approx(float(mean))


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("B-A-B I-A-B O", [("A-B", 0, 2)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_are_what_tags_mark(tags, found):
    assert list(entities(tags.split())) == found


def test_token_metrics_count_entities_where_tags_mark_them():
    task, names = get_task("token-classification"), ["O", "B-P", "I-P", "B-L"]
    labels = torch.tensor([[-100, 1, 2, -100, 0, 3], [-100, 1, -100, 0, 0, -100]])
    guesses = torch.tensor([[3, 1, 2, 3, 3, 3], [0, 1, 2, 2, 0, 3]])
    metrics = task.metrics(totals(task.statistics(functional.one_hot(guesses, 4).double(), labels, names)))
    # There: P, L and P. Guessed: P, L, L; and a P one word too long.
    assert metrics["precision"] == pytest.approx(2 / 4)
    assert metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx(4 / 7)
    assert metrics["accuracy"] == pytest.approx(5 / 7)
    assert metrics["majority"] == pytest.approx(3 / 7)
    other = task.metrics(totals(task.statistics(functional.one_hot(guesses, 4).double(), labels, ["a", "b", "c", "d"])))
    # F1 by tag: 1/2, 1, 2/3, 2/3.
    assert "precision" not in other
    assert other["f1"] == pytest.approx((2 / 4 + 1 + 2 / 3 + 2 / 3) / 4)


@pytest.mark.parametrize(
    ("spans", "labels"),
    [
        # Of one token a word; of several; of tokens that begin with the space before their word.
        ([(0, 0), (0, 3), (4, 8), (9, 10), (0, 0)], [-100, 5, 6, 7, -100]),
        ([(0, 1), (1, 3), (4, 6), (6, 8), (9, 10)], [5, -100, 6, -100, 7]),
        ([(0, 3), (3, 8), (8, 10)], [5, 6, 7]),
        ([(0, 3), (4, 6)], [5, 6]),
    ],
)
def test_the_first_token_of_a_word_has_its_tag(spans, labels):
    assert first_tokens(["New", "York", "x"], [5, 6, 7], spans) == labels


def test_better_is_what_the_task_says():
    for name, better, worse in (
        ("causal-lm", 3.0, 4.0),
        ("sequence-classification", 0.9, 0.8),
        ("regression", 0.1, -0.5),
    ):
        task = get_task(name)
        assert task.score({task.primary: better}) > task.score({task.primary: worse}) > task.score({task.primary: None})
        assert task.score({}) == task.score({task.primary: math.nan}) == -math.inf
    assert get_task("sequence-classification").show("accuracy", 0.7094) == "70.9%"
    assert get_task("causal-lm").show("perplexity", 12.345) == "12.35"
    assert get_task("causal-lm").show("perplexity", None) == "-"
