"""Texts, or pairs of texts, of any number of classes each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedlora.tasks.base import PERCENT, Sums, f1, upcast
from fedlora.tasks.labels import Column, is_missing, read_word_lists
from fedlora.tasks.texts import TextTask

if TYPE_CHECKING:
    import torch


class MultiLabelClassification(TextTask):
    """Every example is of none, one or several of the classes.

    A label is a list of names, or text in which ``|``, ``;`` or ``,`` divide them.
    """

    name = "multi-label-classification"
    title = "any number of classes of a text, or of a pair of texts"
    problem_type = "multi_label_classification"
    keys = ("model.pooling", "data.text_pair", "data.label", "data.label_names")
    scores: ClassVar = {"micro_f1": PERCENT, "macro_f1": PERCENT, "exact_match": PERCENT}
    primary = "micro_f1"
    client_metric = "exact_match"

    def read_labels(self, column: Column, texts: Mapping[str, list[Any]]) -> list[Any]:
        """Read the classes of each example; an empty cell of a CSV file is none of them."""
        for number, cell in enumerate(column.cells):
            if is_missing(cell):
                if column.typed:
                    raise column.error(number, "has no label; write an empty list where no class fits")
                column.cells[number] = ""
        return [list(dict.fromkeys(names)) for names in read_word_lists(column, r"[|;,]", "classes")]

    def names_in(self, label: Any) -> Sequence[str]:
        """Return the names themselves."""
        return label

    def number(self, label: Any, index: Mapping[str, int]) -> list[float]:
        """Return 1 for each class that is named, else 0."""
        named = {index[name] for name in label}
        return [float(number in named) for number in range(len(index))]

    def named(self, label: Any, names: Sequence[str]) -> list[str]:
        """Return the classes of which the number is 1."""
        return [name for name, number in zip(names, label, strict=True) if number]

    def label_array(self, labels: list[Any]) -> np.ndarray:
        """Return 0 or 1, float32 [rows, classes]."""
        return np.array(labels, np.float32)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the binary cross-entropy in nats, the mean over the classes, of logits and labels [N, classes]."""
        from torch.nn import functional

        logits = upcast(logits)
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)

    def drawn_labels(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, outputs: int) -> torch.Tensor:
        """Give each example every second class."""
        import torch

        return ((rows[:, None] + torch.arange(outputs)) % 2).float()

    def statistics(
        self, logits: torch.Tensor, labels: torch.Tensor, label_names: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """Count hits, predictions (a probability above a half) and labels by class, and examples without a fault."""
        import torch

        is_label, is_prediction = labels > 0.5, logits > 0
        return {
            "count": torch.ones(len(labels), dtype=torch.float64, device=logits.device),
            "loss": self.loss(logits, labels),
            "exact": (is_label == is_prediction).all(1),
            "hits": is_label & is_prediction,
            "predictions": is_prediction,
            "labels": is_label,
        }

    def metrics(self, sums: Sums, examples: Sums | None = None) -> dict[str, float]:
        """Return loss, micro and macro F1 (0 of a class that never occurs) and the share without a fault."""
        count = max(1.0, float(sums["count"]))
        parts = [sums[name] for name in ("hits", "predictions", "labels")]
        return {
            "loss": float(sums["loss"] / count),
            "micro_f1": float(f1(*(part.sum() for part in parts))),
            "macro_f1": float(np.mean(f1(*parts))),
            "exact_match": float(sums["exact"] / count),
        }
