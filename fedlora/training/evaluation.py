"""How good a model is on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedlora.adapters import AdaptedModel
from fedlora.data.tokens import TokenTable
from fedlora.timeline import phase


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
        ``loss`` and the scores of the table's task; and ``by_domain``, its primary one, for tasks that give that.
    """
    found = statistics(adapted, table, np.arange(len(table)), batch_size)
    task = table.task
    metrics: dict[str, Any] = task.metrics(_sums(found), found)
    if task.by_domain and domains and table.domain is not None:
        of = np.asarray(table.domain)
        metrics["by_domain"] = {
            name: task.metrics(_sums(found, of == i))[task.primary] for i, name in enumerate(domains) if (of == i).any()
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
        client, examples, loss, and the metric by which the task compares clients.
    """
    found = statistics(adapted, table, np.concatenate(list(partition)), batch_size)
    names = dict.fromkeys(("loss", table.task.client_metric))
    result, start = [], 0
    for client, members in enumerate(partition):
        metrics = table.task.metrics(_sums(found, slice(start, start + len(members))))
        start += len(members)
        result.append({"client": client, "examples": len(members)} | {name: metrics[name] for name in names})
    return result


@torch.no_grad()
def statistics(adapted: AdaptedModel, table: TokenTable, chosen: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """Return what each of the chosen rows adds to an evaluation, in their order: arrays [rows, ...]."""
    adapted.model.eval()
    adapted.layout.set_rows([1])
    # Rows of like length share a batch, which changes no result and saves the padding.
    order = np.argsort(table.lengths[chosen], kind="stable")
    found: dict[str, np.ndarray] = {}
    with phase("evaluation", "evaluating", len(order)) as here:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = table.batch(chosen[places], adapted.device)
            adapted.layout.set_rows([len(places)])
            outputs = adapted.outputs(batch, table.task)
            for name, value in table.task.statistics(outputs, batch["labels"], table.label_names).items():
                values = (value.double() if value.is_floating_point() else value).cpu().numpy()
                if name not in found:
                    found[name] = np.zeros((len(chosen), *values.shape[1:]), values.dtype)
                found[name][places] = values
            here.advance(len(places))
    return found


def _sums(found: dict[str, np.ndarray], rows: Any = slice(None)) -> dict[str, np.ndarray]:
    return {name: values[rows].sum(0) for name, values in found.items()}
