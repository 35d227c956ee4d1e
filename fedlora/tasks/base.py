"""What a task is: how labels become numbers, an example's loss, metrics, and whether higher is better."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedlora.tasks.labels import Column

if TYPE_CHECKING:
    import torch

    from fedlora.config import DataSection

IGNORED = -100
"""The label of a position that has no loss."""

Sums = Mapping[str, np.ndarray]
"""Statistics of an evaluation, summed over examples: all that most metrics need."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown and compared.

    Attributes
    ----------
    form : str
        ``percent`` for shares in [0, 1], else ``number``.
    maximize : bool
        Whether higher is better.
    digits : int
        Number of decimals that are shown.
    of_examples : bool
        Whether it is the share of examples for which something holds, so that one of n examples moves it by 1 / n.
    """

    form: Literal["percent", "number"] = "number"
    maximize: bool = True
    digits: int = 3
    of_examples: bool = False


@dataclass(frozen=True)
class Baseline:
    """A reference value for the primary metric that needs no model.

    Attributes
    ----------
    metric : str
        The score that holds it.
    title : str
        Its name in tables and figures, in two words.
    sentence : str
        How it is reached, as the subject of a sentence that goes on with "gives" and the value.
    """

    metric: str
    title: str
    sentence: str


PERCENT = Metric("percent", digits=1)


@dataclass
class Encoded:
    """Token ids of some examples.

    Attributes
    ----------
    tokens : list of list of int
        Token ids of each row, at most ``model.max_length`` of them. Rows are examples, unless ``of`` says otherwise.
    whole : list of list of int
        Those of each example before the cut, to count how much ``model.max_length`` cuts off.
    texts : list of str
        The text that each example was tokenised from.
    starts : list of int, optional
        Number of leading tokens of each row without a loss, where the tokens are the labels.
    token_types : list of list of int, optional
        For every token, 0 or 1: the text of a pair that it belongs to.
    tags : list of list of int, optional
        The label of every token, -100 for none.
    refused : dict of int to str
        Why an example, which has no token then, cannot be used; by its number.
    of : list of int, optional
        The number of the example that each row is of, where long ones are several rows, one after the other.
    lost : list of int, optional
        How many tokens of each example are in no row; by default those behind ``model.max_length``.
    """

    tokens: list[list[int]] = field(default_factory=list)
    whole: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    starts: list[int] | None = None
    token_types: list[list[int]] | None = None
    tags: list[list[int]] | None = None
    refused: dict[int, str] = field(default_factory=dict)
    of: list[int] | None = None
    lost: list[int] | None = None


class Task(ABC):
    """Base of all tasks. A subclass with a ``name`` in a file of ``fedlora/tasks/`` is found without being listed.

    Attributes
    ----------
    name : str
        ``model.task``.
    title : str
        A description in one line.
    auto_class : str
        The transformers class that loads its model, ``AutoModelFor...``.
    peft_type : str
        A name of ``peft.TaskType``.
    problem_type : str, optional
        What transformers calls the loss, in the model's config.
    causal : bool
        Whether position t predicts token t + 1: the model has no head of its own, and may not see ahead.
    takes_hidden_states : bool
        Whether :meth:`loss` and :meth:`statistics` take :class:`~fedlora.output_layer.HiddenStates` in the place of
        logits that would be too large.
    poolings : tuple of str
        Values of ``model.pooling`` that the task supports.
    keys : tuple of str
        Config keys that this task reads and not every other does.
    labelled : bool
        Whether examples have a label in ``data.label``.
    classes : bool
        Whether labels are names of classes.
    one_class : bool
        Whether every example is of exactly one class, so that a partition can skew it.
    words : bool
        Whether ``data.text`` holds lists of words.
    answers : bool
        Whether examples may be prompts with answers, which ``[evaluation]`` scores; such a task has ``prompts`` and
        ``answered``, as :class:`~fedlora.tasks.causal_lm.CausalLM` does.
    splits : bool
        Whether long examples may be several rows (``data.long_texts``); such a task has ``split``, which does as
        :meth:`encode` and gives :class:`Encoded` with ``of`` and ``lost``.
    packs : bool
        Whether a row may hold several examples (``data.packing``); such a task has ``packed_loss``.
    scores : dict of str to Metric
        The metrics beside ``loss``, and how each is shown.
    primary : str
        The metric that runs are judged by.
    client_metric : str
        The metric by which clients are compared, which a few examples can give: ``loss`` or one of ``scores``.
    by_domain : bool
        Whether the primary metric is given for each domain too.
    baseline : Baseline, optional
    loss_unit : str
    """

    name: ClassVar[str]
    title: ClassVar[str]
    auto_class: ClassVar[str]
    peft_type: ClassVar[str]
    problem_type: ClassVar[str | None] = None
    causal: ClassVar[bool] = False
    takes_hidden_states: ClassVar[bool] = False
    poolings: ClassVar[tuple[str, ...]] = ("default",)
    keys: ClassVar[tuple[str, ...]]
    labelled: ClassVar[bool] = True
    classes: ClassVar[bool] = True
    one_class: ClassVar[bool] = False
    words: ClassVar[bool] = False
    answers: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    scores: ClassVar[Mapping[str, Metric]]
    primary: ClassVar[str]
    client_metric: ClassVar[str] = "loss"
    by_domain: ClassVar[bool] = False
    baseline: ClassVar[Baseline | None] = None
    loss_unit: ClassVar[str] = "nats"

    # Data.

    def columns(self, data: DataSection) -> dict[str, str]:
        """Return the columns of an example's texts: the key of ``data`` that names each, and the column."""
        return {"text": data.text}

    def read_labels(self, column: Column, texts: Mapping[str, list[Any]]) -> list[Any]:
        """Return the labels of a column's cells as words, lists of words or numbers.

        Parameters
        ----------
        column : Column
        texts : Mapping[str, list]
            The examples' texts, by the keys of :meth:`columns`.

        Raises
        ------
        InputError
            Naming column and row of what is no label of this task.
        """
        raise NotImplementedError

    def names_in(self, label: Any) -> Sequence[str]:
        """Return the classes that a label names."""
        return (label,)

    def number(self, label: Any, index: Mapping[str, int]) -> Any:
        """Return a label as numbers, by the number of each class."""
        return index[label]

    def named(self, label: Any, names: Sequence[str]) -> Any:
        """Undo :meth:`number`: return a label as the names of its classes."""
        return names[label]

    def label_array(self, labels: list[Any]) -> np.ndarray | None:
        """Return the numbers of all examples' labels, [rows] or [rows, labels]; None where tokens have the labels."""
        return np.array(labels, np.int64)

    @abstractmethod
    def encode(self, tokenizer: Any, examples: Mapping[str, list[Any]], max_length: int, token_types: bool) -> Encoded:
        """Tokenise examples.

        Parameters
        ----------
        tokenizer : transformers.PreTrainedTokenizerBase
        examples : Mapping[str, list]
            The columns of :meth:`columns` by their keys, and ``label``.
        max_length : int
            ``model.max_length``.
        token_types : bool
            Whether the model tells the two texts of a pair by token types.
        """

    # Model.

    def outputs(self, label_names: Sequence[str] | None) -> int | None:
        """Return how many outputs the head has; None for a model without one."""
        return None if label_names is None else len(label_names)

    @abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each example, [N].

        An example's loss depends on nothing but the example, whatever its neighbours: the clipping of DP-SGD, and
        cohorts of clients, rest on it. Of a label a token it is the mean over the example's own tokens.

        Parameters
        ----------
        logits : Tensor [N, outputs] or [N, T, outputs]
        labels : Tensor
            As :meth:`~fedlora.data.tokens.TokenTable.batch` gives them.
        """

    @abstractmethod
    def drawn_labels(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, outputs: int) -> torch.Tensor:
        """Return labels of synthetic examples, each from its own example alone.

        :mod:`fedlora.training.soundness` measures with them whether a model's examples depend on each other.

        Parameters
        ----------
        ids, mask : Tensor [N, T]
        rows : Tensor [N]
            A number for each example.
        outputs : int
            Number of the head's outputs.
        """

    # Evaluation.

    @abstractmethod
    def statistics(
        self, logits: torch.Tensor, labels: torch.Tensor, label_names: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """Return what each example adds to an evaluation, each [N, ...]; :meth:`metrics` needs their sums alone."""

    @abstractmethod
    def metrics(self, sums: Sums, examples: Sums | None = None) -> dict[str, float]:
        """Return ``loss`` and the scores of the statistics' sums.

        Parameters
        ----------
        sums : Mapping[str, ndarray]
        examples : Mapping[str, ndarray], optional
            The statistics of every single example, where one place has them all: for metrics that no sum can give,
            such as a rank correlation. These are left out without them.
        """

    # Reporting.

    @property
    def maximize(self) -> bool:
        """Whether the primary metric is better the higher it is."""
        return self.scores[self.primary].maximize

    def score(self, metrics: Mapping[str, Any]) -> float:
        """Return the primary metric, negated if lower is better; minus infinity if it is missing or not a number."""
        value = metrics.get(self.primary)
        if value is None or math.isnan(value):
            return -math.inf
        return float(value) if self.maximize else -float(value)

    def form(self, name: str) -> str:
        """Return how a metric is written: percent or number."""
        return self.scores[name].form if name in self.scores else "number"

    def better_high(self, name: str) -> bool:
        """Whether a metric (loss too) is better the higher it is."""
        return name in self.scores and self.scores[name].maximize

    def show(self, name: str, value: float | None) -> str:
        """Write a metric's value for a line of text."""
        if value is None:
            return "-"
        metric = self.scores.get(name, Metric())
        return f"{value:.{metric.digits}%}" if metric.form == "percent" else f"{value:.{metric.digits}f}"


def f1(true: np.ndarray, predicted: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return the F1 of each class; 0 for a class without predictions and labels.

    Parameters
    ----------
    true, predicted, there : ndarray [classes]
        Numbers of true positives, of predictions and of labels.
    """
    true, total = np.asarray(true, np.float64), np.asarray(predicted, np.float64) + np.asarray(there, np.float64)
    return np.divide(2 * true, total, out=np.zeros_like(total), where=total > 0)


def upcast(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32 or float64: a loss in half precision would lose most of its digits."""
    import torch

    return logits if logits.dtype == torch.float64 else logits.float()
