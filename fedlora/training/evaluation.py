"""How good a model is on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedlora.adapters import AdaptedModel
from fedlora.data.tokens import TokenTable
from fedlora.training.loss import per_example_loss, token_losses


def evaluate(
    adapted: AdaptedModel, table: TokenTable, batch_size: int, domains: list[str] | None = None
) -> dict[str, Any]:
    """Evaluate a model whose arrays all rows share on a whole table.

    Parameters
    ----------
    adapted : AdaptedModel
    table : TokenTable
    batch_size : int
    domains : list of str, optional
        Names of the table's domains, for ``by_domain``.

    Returns
    -------
    dict
        Classification: loss (nats), accuracy, macro_f1, majority (share of the largest class), all shares in [0, 1].
        Language models: loss (nats a target token) and perplexity, and by_domain if there are domains.
    """
    values, weights, predictions = _score(adapted, table, np.arange(len(table)), batch_size)
    loss = float(values.sum() / max(1.0, weights.sum()))
    if table.labels is not None:
        labels = np.asarray(table.labels)
        return {"loss": loss, **classification_metrics(labels, predictions)}
    metrics: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if domains and table.domain is not None:
        of = np.asarray(table.domain)
        metrics["by_domain"] = {
            name: math.exp(min(700.0, float(values[of == i].sum() / max(1.0, weights[of == i].sum()))))
            for i, name in enumerate(domains)
            if (of == i).any()
        }
    return metrics


def evaluate_clients(
    adapted: AdaptedModel, table: TokenTable, partition: Sequence[np.ndarray], batch_size: int
) -> list[dict[str, Any]]:
    """Evaluate a model whose arrays all rows share on the examples of every client, in batches across clients.

    Parameters
    ----------
    adapted : AdaptedModel
    table : TokenTable
    partition : sequence of np.ndarray
        Rows of the table that each client holds; disjoint.
    batch_size : int

    Returns
    -------
    list of dict
        client, examples and loss (nats, of an example or a target token), and accuracy for classification.
    """
    rows = np.concatenate(list(partition))
    values, weights, predictions = _score(adapted, table, rows, batch_size)
    hits = predictions == np.asarray(table.labels)[rows] if table.labels is not None else None
    result, start = [], 0
    for client, members in enumerate(partition):
        own = slice(start, start + len(members))
        start += len(members)
        loss = float(values[own].sum() / max(1.0, weights[own].sum()))
        line: dict[str, Any] = {"client": client, "examples": len(members), "loss": loss}
        result.append(line if hits is None else line | {"accuracy": float(np.mean(hits[own]))})
    return result


@torch.no_grad()
def _score(
    adapted: AdaptedModel, table: TokenTable, chosen: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each of the chosen rows the sum of its losses, how many these are, and the class predicted."""
    adapted.model.eval()
    adapted.layout.set_rows([1])
    # Rows of like length share a batch, which changes no result and saves the padding.
    order = np.argsort(table.lengths[chosen], kind="stable")
    values, weights = np.zeros(len(chosen)), np.zeros(len(chosen))
    predictions = np.zeros(len(chosen), np.int64)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = table.batch(chosen[places], adapted.device)
        adapted.layout.set_rows([len(places)])
        logits = adapted.logits(batch)
        if batch["labels"].dim() == 1:
            values[places] = per_example_loss(logits, batch["labels"]).double().cpu().numpy()
            weights[places] = 1
            predictions[places] = logits.argmax(1).cpu().numpy()
        else:
            sums, counts = token_losses(logits, batch["labels"])
            values[places], weights[places] = sums.double().cpu().numpy(), counts.cpu().numpy()
    return values, weights, predictions


def classification_metrics(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 (mean over the classes that occur in labels or predictions) and the majority class's share."""
    scores = []
    for label in np.union1d(labels, predictions):
        hits = np.sum((labels == label) & (predictions == label))
        scores.append(2 * hits / (np.sum(labels == label) + np.sum(predictions == label)))
    return {
        "accuracy": float(np.mean(labels == predictions)),
        "macro_f1": float(np.mean(scores)),
        "majority": float(np.bincount(labels).max() / len(labels)),
    }
