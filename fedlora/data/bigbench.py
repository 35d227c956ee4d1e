"""Tasks of BIG-bench as tables: read once from their JSON, divided, and kept as Parquet in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora.assets import Asset, build_once, cache_dir
from fedlora.tasks.chat import conversation

PACKAGE = "bigbench"
"""The package whose assets are read here."""

FORM = 2
"""Version of the tables' columns and splits. Each version has its own folders in the cache."""

SPLITS = ("train", "validation", "test")

_COLUMNS = {
    "vitaminc": ["evidence", "claim", "label", "page"],
    "e2e-nlg": ["text", "answer", "references", "messages"],
}
_CHOICES = ["text", "answer", "choices", "messages"]
"""Columns of the tables of all other assets."""

_CANARY = "canary"
_SHARE = 0.1


def bigbench_files(asset: Asset, folder: Path, field: str) -> dict[str, Path]:
    """Return an asset's splits as Parquet files, which are made first if they are not in the cache.

    Parameters
    ----------
    asset : Asset
    folder : Path
        Where its task.json lies.
    field : str
        The config key that errors name.

    Returns
    -------
    dict of str to Path
        ``train``, ``validation`` and ``test``: about 80, 10 and 10 percent. Rows that belong together (claims about
        one Wikipedia page, or equal inputs) are all in one of them: their hash decides, so that the split is the same
        everywhere and does not depend on any seed.

    Raises
    ------
    InputError
        If the cache cannot be written.
    """

    def build(target: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = json.loads((folder / asset.file(".json")).read_text(encoding="utf-8"))
        read = _READERS.get(asset.name, _choices_or_texts)
        rows = [read(example, content) for example in content["examples"]]
        # The canary tells whoever collects text for pretraining to leave this out.
        metadata = {_CANARY: str(content.get(_CANARY, ""))}
        for split in SPLITS:
            table = pa.Table.from_pylist([row for key, row in rows if split_of(key) == split])
            pq.write_table(table.replace_schema_metadata(metadata), target / f"{split}.parquet")

    files = table_files(asset)
    build_once(files["train"].parent, build, field, asset.name)
    return files


def columns_of(asset: Asset) -> list[str]:
    """Return the columns of an asset's tables, which need not have been made."""
    return _COLUMNS.get(asset.name, _CHOICES)


def table_files(asset: Asset) -> dict[str, Path]:
    """Return where the cache has an asset's splits, if they were made."""
    made = cache_dir() / "converted" / f"{asset.name}-{asset.version}-{FORM}"
    return {split: made / f"{split}.parquet" for split in SPLITS}


def split_of(key: str) -> str:
    """Return the split of all rows with a key."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "test" if place < _SHARE else "validation" if place < 2 * _SHARE else "train"


Row = tuple[str, dict[str, Any]]
"""The key by which a row is put into a split, and its columns."""


def _vitaminc(example: Mapping[str, Any], task: Mapping[str, Any]) -> Row:
    """Divide ``PAGE: EVIDENCE\\nClaim: CLAIM`` into its parts. Colons of pages' names are written -COLON- there."""
    passage, claim = example["input"].split("\nClaim: ")
    page, evidence = passage.split(": ", 1)
    label = _best(example["target_scores"])
    return page, {"evidence": evidence, "claim": claim, "label": label, "page": page}


def _choices_or_texts(example: Mapping[str, Any], task: Mapping[str, Any]) -> Row:
    """Read a question with its choices, or an input with its references; and either as a conversation."""
    text = example["input"].strip()
    scores = example.get("target_scores")
    if scores:
        answer, choices = _best(scores), list(scores)
        messages = conversation(_asked(text, choices, task), answer)
        return text, {"text": text, "answer": answer, "choices": choices, "messages": messages}
    target = example["target"]
    references = [target] if isinstance(target, str) else list(target)
    messages = conversation(_asked(text, [], task), references[0])
    return text, {"text": text, "answer": references[0], "references": references, "messages": messages}


def _asked(text: str, choices: list[str], task: Mapping[str, Any]) -> str:
    """Ask as BIG-bench does: between the task's own words, with the choices unless the task leaves them out.

    Its general ``Q:`` and ``A:`` are for models without turns.
    """
    before, after = task.get("example_input_prefix", "").strip(), task.get("example_output_prefix", "").strip()
    shown = choices if task.get("append_choices_to_input", True) else []
    lines = [f"{before} {text}".strip(), *(f"choice: {choice}" for choice in shown), after]
    return "\n".join(line for line in lines if line)


def _best(scores: Mapping[str, float]) -> str:
    """Return the choice with the highest score, the first of equals."""
    return max(scores, key=lambda choice: scores[choice])


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Row]] = {"vitaminc": _vitaminc}
