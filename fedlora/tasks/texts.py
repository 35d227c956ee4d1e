"""Examples of one text or a pair of texts, for the tasks that judge them as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedlora.tasks.base import Encoded, Task

if TYPE_CHECKING:
    from fedlora.config import DataSection

PAIR = "text_pair"


class TextTask(Task):
    """Base of the tasks whose model has a head on a text, or on the pair of ``data.text`` and ``data.text_pair``."""

    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    poolings = ("default", "mean")

    def columns(self, data: DataSection) -> dict[str, str]:
        """Return the columns of the text and of the second text, if one is named."""
        return {"text": data.text} if data.text_pair is None else {"text": data.text, PAIR: data.text_pair}

    def encode(self, tokenizer: Any, examples: Mapping[str, list[Any]], max_length: int, token_types: bool) -> Encoded:
        """Tokenise with the special tokens; of a pair the longer text is cut first."""
        texts, pairs = examples["text"], examples.get(PAIR)
        types = token_types and pairs is not None
        found = tokenise(tokenizer, texts, max_length, pairs=pairs, token_types=types)
        rows: list[list[int]] = found["input_ids"]
        # Rows that may have been cut are tokenised again without a limit.
        long = [number for number, ids in enumerate(rows) if len(ids) >= max_length]
        again = [texts[number] for number in long], [pairs[number] for number in long] if pairs else None
        whole = dict(zip(long, tokenise(tokenizer, again[0], None, pairs=again[1])["input_ids"], strict=True))
        return Encoded(
            tokens=rows,
            whole=[whole.get(number, ids) for number, ids in enumerate(rows)],
            texts=texts if pairs is None else [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)],
            token_types=found["token_type_ids"] if types else None,
        )


def tokenise(
    tokenizer: Any,
    texts: list[str],
    max_length: int | None,
    *,
    special: bool = True,
    pairs: list[str] | None = None,
    token_types: bool = False,
    offsets: bool = False,
) -> dict[str, list[Any]]:
    """Return ``input_ids`` of texts, cut to a length if one is given; with ``token_type_ids`` and ``offset_mapping``.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : list of str
    max_length : int or None
    special : bool
        Add the special tokens.
    pairs : list of str, optional
        Second texts.
    token_types, offsets : bool
        Return these too.
    """
    if not texts:
        return {"input_ids": [], "token_type_ids": [], "offset_mapping": []}
    second = {} if pairs is None else {"text_pair": pairs}
    more = {"return_offsets_mapping": True} if offsets else {}
    return tokenizer(
        texts,
        **second,
        add_special_tokens=special,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=token_types,
        verbose=False,
        **more,
    )
