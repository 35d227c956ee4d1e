"""Words with a tag each, such as named entities or parts of speech."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedlora.errors import InputError
from fedlora.tasks.base import IGNORED, PERCENT, Encoded, Sums, Task, f1, upcast
from fedlora.tasks.labels import Column, is_missing, read_word_lists
from fedlora.tasks.texts import tokenise

if TYPE_CHECKING:
    import torch


Entity = tuple[str, int, int]
"""Type, first word and the word behind the last."""


class TokenClassification(Task):
    """Every word has a tag, which the model gives at the word's first token.

    ``data.text`` names the column of the words and ``data.label`` that of their tags: lists, or text that white space
    divides. Tags such as ``B-PER``, ``I-PER`` and ``O`` mark entities.
    """

    name = "token-classification"
    title = "a tag of every word, such as named entities"
    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    keys = ("data.label", "data.label_names")
    words = True
    scores: ClassVar = {
        "f1": PERCENT,
        "precision": PERCENT,
        "recall": PERCENT,
        "accuracy": PERCENT,
        "majority": PERCENT,
    }
    primary = "f1"
    client_metric = "accuracy"

    def read_labels(self, column: Column, texts: Mapping[str, list[Any]]) -> list[Any]:
        """Read the tags of each example's words.

        Raises
        ------
        InputError
            Also where there are not as many tags as words.
        """
        for number, cell in enumerate(column.cells):
            if is_missing(cell):
                raise column.error(number, "has no tags; fill them in or remove the row")
        tags = read_word_lists(column, r"\s+", "tags")
        for number, (words, own) in enumerate(zip(texts.get("text", tags), tags, strict=True)):
            if len(words) != len(own):
                raise column.error(number, f"has {len(own)} tags for {len(words)} words; give each word one")
        return tags

    def names_in(self, label: Any) -> Sequence[str]:
        """Return the tags themselves."""
        return label

    def number(self, label: Any, index: Mapping[str, int]) -> list[int]:
        """Return the number of each tag."""
        return [index[tag] for tag in label]

    def named(self, label: Any, names: Sequence[str]) -> list[str]:
        """Return each tag."""
        return [names[number] for number in label]

    def label_array(self, labels: list[Any]) -> None:
        """Return nothing: tokens have the labels."""

    def encode(self, tokenizer: Any, examples: Mapping[str, list[Any]], max_length: int, token_types: bool) -> Encoded:
        """Tokenise the words as one text with spaces between; a word's first token has its tag, others none.

        Raises
        ------
        InputError
            If the tokenizer cannot say which characters a token is made of.
        """
        if not tokenizer.is_fast:
            remedy = f"has no fast tokenizer, which {self.name} needs; choose another model"
            raise InputError("model.name", tokenizer.name_or_path, remedy)
        texts = [" ".join(words) for words in examples["text"]]
        found = tokenise(tokenizer, texts, None, offsets=True)
        rows: list[list[int]] = found["input_ids"]
        encoded = Encoded(whole=rows, texts=texts, tags=[])
        assert encoded.tags is not None
        cut = tokenise(tokenizer, texts, max_length, offsets=True)
        for words, tags, ids, spans in zip(
            examples["text"], examples["label"], cut["input_ids"], cut["offset_mapping"], strict=True
        ):
            encoded.tokens.append(ids)
            encoded.tags.append(first_tokens(words, tags, spans))
        return encoded

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy in nats, the mean over each example's own tagged tokens.

        Parameters
        ----------
        logits : Tensor [N, T, tags]
        labels : Tensor [N, T]
            -100 where a token has no tag.
        """
        from torch.nn import functional

        losses = functional.cross_entropy(
            upcast(logits).transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        )
        return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)

    def drawn_labels(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, outputs: int) -> torch.Tensor:
        """Give each token the tag of its id modulo the number of tags."""
        return (ids % outputs).masked_fill(~mask, IGNORED)

    def statistics(
        self, logits: torch.Tensor, labels: torch.Tensor, label_names: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """Count hits, predictions and labels by tag; where tags mark entities, count the entities too."""
        import torch

        tagged, predicted = labels != IGNORED, logits.argmax(2)
        tags = torch.arange(logits.shape[2], device=logits.device)
        is_label = labels[..., None] == tags
        is_prediction = (predicted[..., None] == tags) & tagged[..., None]
        found = {
            "count": torch.ones(len(labels), dtype=torch.float64, device=logits.device),
            "loss": self.loss(logits, labels),
            "hits": (is_label & is_prediction).sum(1),
            "predictions": is_prediction.sum(1),
            "labels": is_label.sum(1),
        }
        names = tuple(label_names or ())
        if marks_entities(names):
            counts = [
                _count_entities(names, own[own != IGNORED], guess[own != IGNORED])
                for own, guess in zip(labels.cpu().numpy(), predicted.cpu().numpy(), strict=True)
            ]
            found["entities"] = torch.tensor(counts, dtype=torch.int64).reshape(len(labels), 3)
        return found

    def metrics(self, sums: Sums, examples: Sums | None = None) -> dict[str, float]:
        """Return loss and accuracy of tokens, F1 and the share of the most frequent tag.

        F1 is that of entities, exact in type and extent, with precision and recall; of tags that mark none it is the
        mean over the tags that occur as label or prediction.
        """
        tokens = max(1.0, float(sums["labels"].sum()))
        found = {"loss": float(sums["loss"] / max(1.0, float(sums["count"])))}
        if "entities" in sums:
            hits, predicted, there = (float(count) for count in sums["entities"])
            found["f1"] = float(f1(np.array(hits), np.array(predicted), np.array(there)))
            found |= {"precision": hits / max(1.0, predicted), "recall": hits / max(1.0, there)}
        else:
            occur = sums["predictions"] + sums["labels"] > 0
            scores = f1(sums["hits"], sums["predictions"], sums["labels"])[occur]
            found["f1"] = float(np.mean(scores)) if len(scores) else 0.0
        found["accuracy"] = float(sums["hits"].sum() / tokens)
        found["majority"] = float(sums["labels"].max() / tokens)
        return found


def first_tokens(words: Sequence[str], tags: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the label of every token of a text: the tag at the first token of each word, else -100.

    Parameters
    ----------
    words : sequence of str
        The text is these with one space between.
    tags : sequence of int
        A word without a tag gives its token none.
    spans : sequence of (int, int)
        First character of each token, and the one behind its last; equal for special tokens.
    """
    ends = np.cumsum([len(word) + 1 for word in words])
    labels, seen = [], set[int]()
    for first, last in spans:
        # A token may begin with the space before its word, so its last character says which word it is of.
        word = int(np.searchsorted(ends, last - 1, side="right"))
        if first == last or word in seen or word >= len(tags):
            labels.append(IGNORED)
        else:
            seen.add(word)
            labels.append(tags[word])
    return labels


@cache
def marks_entities(names: tuple[str, ...]) -> bool:
    """Whether tags are ``O`` and ``B-`` or ``I-`` of types."""
    return "O" in names and len(names) > 1 and all(n == "O" or (n[:2] in ("B-", "I-") and len(n) > 2) for n in names)


def entities(tags: Iterable[str]) -> Iterator[Entity]:
    """Yield the entities that tags mark.

    One begins with ``B-``, and also with an ``I-`` that continues none of its type (as in the IOB1 scheme, and as
    conlleval counts); it goes on with ``I-`` of its type.
    """
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        if kind and (prefix != "I" or own != kind):
            yield kind, start, place
            kind = ""
        if not kind and prefix in ("B", "I"):
            kind, start = own, place


def _count_entities(names: Sequence[str], labels: np.ndarray, predicted: np.ndarray) -> tuple[int, int, int]:
    """Count the entities that were found, that were predicted, and that there are."""
    there, guessed = (set(entities(names[tag] for tag in tags)) for tags in (labels, predicted))
    return len(there & guessed), len(guessed), len(there)
