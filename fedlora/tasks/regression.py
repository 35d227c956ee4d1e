"""Texts, or pairs of texts, with a number each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedlora.tasks.base import Metric, Sums, upcast
from fedlora.tasks.labels import Column, read_numbers
from fedlora.tasks.texts import TextTask

if TYPE_CHECKING:
    import torch


class Regression(TextTask):
    """Every example has a number, which the model's one output is to equal; it is not scaled."""

    name = "regression"
    title = "a number of a text, or of a pair of texts"
    problem_type = "regression"
    keys = ("model.pooling", "data.text_pair", "data.label")
    classes = False
    scores: ClassVar = {
        "pearson": Metric(),
        "spearman": Metric(),
        "r2": Metric(),
        "mae": Metric(maximize=False),
    }
    primary = "pearson"
    loss_unit = "squared error"

    def read_labels(self, column: Column, texts: Mapping[str, list[Any]]) -> list[Any]:
        """Read each label as a number."""
        return list(read_numbers(column))

    def label_array(self, labels: list[Any]) -> np.ndarray:
        """Return the numbers, float32 [rows]."""
        return np.array(labels, np.float32)

    def outputs(self, label_names: Sequence[str] | None) -> int:
        """Return 1."""
        return 1

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the squared error of logits [N, 1] and numbers [N]."""
        predicted = upcast(logits)[:, 0]
        return (predicted - labels.to(predicted.dtype)).square()

    def drawn_labels(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, outputs: int) -> torch.Tensor:
        """Give each example its number."""
        return rows.float()

    def statistics(
        self, logits: torch.Tensor, labels: torch.Tensor, label_names: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """Return prediction and label, their squares and product, and the error."""
        import torch

        x, y = logits[:, 0].double(), labels.double()
        return {
            "count": torch.ones_like(y),
            "loss": self.loss(logits, labels),
            "error": (x - y).abs(),
            "prediction": x,
            "label": y,
            "predictions_squared": x * x,
            "labels_squared": y * y,
            "product": x * y,
        }

    def metrics(self, sums: Sums, examples: Sums | None = None) -> dict[str, float]:
        """Return loss (mean squared error), mean absolute error, r2, and both correlations.

        A correlation with something constant is 0, and so is r2 where all labels are equal; correlations of predictions
        that are not finite are nan. Spearman's is of ranks, which no sum can give.
        """
        n = max(1.0, float(sums["count"]))
        x, y = float(sums["prediction"]) / n, float(sums["label"]) / n
        var_x = _variance(float(sums["predictions_squared"]) / n, x)
        var_y = _variance(float(sums["labels_squared"]) / n, y)
        constant = var_x == 0 or var_y == 0
        found = {
            "loss": float(sums["loss"] / n),
            "pearson": 0.0 if constant else float((sums["product"] / n - x * y) / np.sqrt(var_x * var_y)),
            "r2": 0.0 if var_y == 0 else float(1 - sums["loss"] / n / var_y),
            "mae": float(sums["error"] / n),
        }
        if examples is not None:
            from scipy.stats import spearmanr

            ranks = 0.0 if constant else spearmanr(examples["prediction"], examples["label"]).statistic
            found["spearman"] = float(ranks)
        return found


def _variance(square: float, mean: float) -> float:
    """Return the variance of its two moments; 0 where it is what rounding leaves of a constant."""
    variance = square - mean * mean
    return 0.0 if variance <= 1e-12 * square else float(variance)
