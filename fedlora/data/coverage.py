"""How well a tokenizer and ``model.max_length`` cover the texts: unknown tokens, texts without any, and what is cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from fedlora.errors import InputError
from fedlora.tasks import Encoded

UNKNOWN_REFUSED = 0.5
"""Share of unknown tokens, or of texts without a token, from which a run would learn next to nothing."""

UNKNOWN_NOTED = 0.05


@dataclass
class Coverage:
    """Counts over the texts of one table, as they were before rows were cut.

    Attributes
    ----------
    rows, tokens : int
        All of them; special tokens count.
    words, unknown : int
        Tokens that are not special, and those of them that the tokenizer does not know.
    empty : int
        Rows without a token that is not special.
    distinct_texts, distinct_rows : int
        Of texts, and of their token ids; counted up to 2.
    cut_rows, cut_tokens : int
        What ``model.max_length`` cuts off.
    dropped_rows : int
        Those of which the whole answer is cut off.
    split_rows, made_rows, most_rows : int
        Of long texts that become several rows: how many there are, all their rows, and the most of one text.
    bare : int
        Rows that are cut to their special tokens.
    largest : int
        The largest token id.
    """

    rows: int = 0
    tokens: int = 0
    words: int = 0
    unknown: int = 0
    empty: int = 0
    distinct_texts: int = 0
    distinct_rows: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    dropped_rows: int = 0
    split_rows: int = 0
    made_rows: int = 0
    most_rows: int = 0
    bare: int = 0
    largest: int = 0
    _first: tuple[str, list[int]] | None = field(default=None, repr=False)

    def add(self, encoded: Encoded, tokenizer: Any, max_length: int) -> None:
        """Count texts and their token ids, before any is cut to ``max_length``, and the rows that they become."""
        whole, made = encoded.whole, Counter(encoded.of if encoded.of is not None else ())
        lost = encoded.lost if encoded.lost is not None else [max(0, len(row) - max_length) for row in whole]
        several = [rows for rows in made.values() if rows > 1]
        self.split_rows += len(several)
        self.made_rows += sum(several)
        self.most_rows = max([self.most_rows, *several])
        unknown = tokenizer.unk_token_id
        special = set(tokenizer.all_special_ids)
        if unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
            special.discard(unknown)
        for text, row, cut in zip(encoded.texts, whole, lost, strict=True):
            words = [token for token in row if token not in special]
            self.rows += 1
            self.tokens += len(row)
            self.words += len(words)
            self.unknown += words.count(unknown)
            self.empty += not words
            self.bare += 0 < len(words) <= cut
            self.cut_rows += cut > 0
            self.cut_tokens += cut
            self.largest = max(self.largest, max(row, default=0))
            if self._first is None:
                self._first, self.distinct_texts, self.distinct_rows = (text, row), 1, 1
            else:
                self.distinct_texts += self.distinct_texts == 1 and text != self._first[0]
                self.distinct_rows += self.distinct_rows == 1 and row != self._first[1]

    def to_dict(self) -> dict[str, int]:
        """Return the counts, as JSON can hold them."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


def check_coverage(model: str, max_length: int, tables: dict[str, Coverage], vocabulary: int | None) -> None:
    """Refuse a tokenizer that knows next to nothing of the texts, or whose tokens the model has no embeddings for.

    What is said quotes counts of the texts: on a real node it goes to the owner's log alone.

    Parameters
    ----------
    model : str
        ``model.name``, for the error.
    max_length : int
        ``model.max_length``.
    tables : dict of str to Coverage
        By table.
    vocabulary : int or None
        How many token embeddings the model has, if that is known.

    Raises
    ------
    InputError
    """
    remedy = "put the model's own tokenizer files beside its weights"
    for name, found in tables.items():
        if vocabulary is not None and found.largest >= vocabulary:
            why = f"its tokenizer gives {name} the token {found.largest}, but the model has {vocabulary} embeddings"
            cure = (
                "save the model after resize_token_embeddings(len(tokenizer)), or take the tokens that were added out"
            )
            raise InputError("model.name", model, f"{why}; {cure}")
        if found.rows and found.empty / found.rows >= UNKNOWN_REFUSED:
            share = f"{found.empty / found.rows:.0%}"
            raise InputError(
                "model.name", model, f"its tokenizer finds no token in {share} of the texts of {name}; {remedy}"
            )
        if found.words and found.unknown / found.words >= UNKNOWN_REFUSED:
            share = f"{found.unknown / found.words:.0%}"
            raise InputError(
                "model.name", model, f"its tokenizer does not know {share} of the tokens of {name}; {remedy}"
            )
        if found.distinct_texts > 1 and found.distinct_rows == 1:
            raise InputError("model.name", model, f"its tokenizer gives all texts of {name} the same tokens; {remedy}")
        if found.rows and found.bare / found.rows >= UNKNOWN_REFUSED:
            share = f"{found.bare / found.rows:.0%}"
            remedy = f"leaves only special tokens of {share} of the texts of {name}; raise it"
            raise InputError("model.max_length", max_length, remedy)


def coverage_notes(max_length: int, tables: dict[str, Coverage]) -> list[str]:
    """Say what is split and cut in which tables, and what share of tokens is unknown if it is not small."""
    notes = []
    for name, found in tables.items():
        done = []
        if found.split_rows:
            done.append(f"splits {found.split_rows:,} of {found.rows:,} texts of {name} into {found.made_rows:,} rows")
        if found.cut_rows:
            rows = f"{found.cut_rows:,} of {found.rows:,} rows"
            tokens = f"{found.cut_tokens:,} of {found.tokens:,} tokens"
            out = f", and {found.dropped_rows:,} rows without an answer" if found.dropped_rows else ""
            done.append(f"cuts {rows} of {name}: {tokens} are dropped{out}")
        if done:
            notes.append(f"model.max_length = {max_length} {' and '.join(done)}")
        if found.words and found.unknown / found.words >= UNKNOWN_NOTED:
            share = f"{found.unknown / found.words:.0%}"
            notes.append(f"the tokenizer does not know {share} of the tokens of {name}")
    return notes
