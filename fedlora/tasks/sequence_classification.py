"""Texts, or pairs of texts, of one class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedlora.tasks.base import PERCENT, Baseline, Metric, Sums, f1, upcast
from fedlora.tasks.labels import Column, read_words
from fedlora.tasks.texts import TextTask

if TYPE_CHECKING:
    import torch


class SequenceClassification(TextTask):
    """Every example is of one of two or more classes."""

    name = "sequence-classification"
    title = "one class of a text, or of a pair of texts"
    keys = ("model.pooling", "data.text_pair", "data.label", "data.label_names")
    one_class = True
    scores: ClassVar = {
        "accuracy": Metric("percent", digits=1, of_examples=True),
        "macro_f1": PERCENT,
        "majority": PERCENT,
    }
    primary = client_metric = "accuracy"
    baseline = Baseline("majority", "majority class", "Always naming the largest class")

    def read_labels(self, column: Column, texts: Mapping[str, list[Any]]) -> list[Any]:
        """Read each label as a word."""
        return list(read_words(column))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy in nats of logits [N, classes] and classes [N]."""
        from torch.nn import functional

        return functional.cross_entropy(upcast(logits), labels, reduction="none")

    def drawn_labels(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, outputs: int) -> torch.Tensor:
        """Give each example a class by its number."""
        return rows % outputs

    def statistics(
        self, logits: torch.Tensor, labels: torch.Tensor, label_names: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """Count hits, predictions and labels by class."""
        import torch

        predicted, classes = logits.argmax(1), torch.arange(logits.shape[1], device=logits.device)
        is_label, is_prediction = labels[:, None] == classes, predicted[:, None] == classes
        return {
            "count": torch.ones(len(labels), dtype=torch.float64, device=logits.device),
            "loss": self.loss(logits, labels),
            "hits": is_label & is_prediction,
            "predictions": is_prediction,
            "labels": is_label,
        }

    def metrics(self, sums: Sums, examples: Sums | None = None) -> dict[str, float]:
        """Return loss, accuracy, macro F1 (over the classes that occur as label or prediction) and majority share."""
        count = max(1.0, float(sums["count"]))
        occur = sums["predictions"] + sums["labels"] > 0
        scores = f1(sums["hits"], sums["predictions"], sums["labels"])[occur]
        return {
            "loss": float(sums["loss"] / count),
            "accuracy": float(sums["hits"].sum() / count),
            "macro_f1": float(np.mean(scores)) if len(scores) else 0.0,
            "majority": float(sums["labels"].max() / count),
        }
