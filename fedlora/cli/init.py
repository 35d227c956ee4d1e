"""``fedlora init``: a few questions, or options, and a commented config that runs."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from fedlora.config import Config, load_config, read_toml
from fedlora.errors import InputError

_TEXTS = ("text", "sentence", "review", "content", "body", "message", "comment", "document")
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "verdict", "rating", "stars", "score")
"""Names by which a column is taken for the texts or the labels, in this order."""
_SENTENCE_ENCODERS = ("asset:minilm-l6", "asset:mpnet-base")
"""Models without a trained pooler, whose tokens are averaged."""
_NONE = "none"
_QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.toml"
"""Where method and local training come from: an example that is known to work."""


@dataclass(frozen=True)
class _Columns:
    """The columns of a file; of other sources nothing is known before they are loaded."""

    names: Sequence[str]
    table: Any

    def guess(self, usual: Sequence[str], other: str = "") -> str:
        """Return the first of the usual names that is a column, or another column."""
        lower = {name.lower(): name for name in self.names}
        return next((lower[name] for name in usual if name in lower), other)

    def values(self, name: str, option: str) -> list[Any]:
        """Return a column's values; raise InputError, naming the option, if there is none of that name."""
        from fedlora.data.columns import read_column

        return read_column(self.table, name, option)


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The config to write.")] = Path("fedlora.toml"),
    data: Annotated[
        str | None, typer.Option(help="A CSV, TSV, JSONL or Parquet file, asset:NAME, or a hub id.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the texts.")] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the labels; none trains a language model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="asset:NAME, a hub id, or a folder.")] = None,
    owner: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column that names each row's owner: one client an owner.")
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Number of clients among which rows are divided at random.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(min=0, help="Epsilon that no client may exceed; 0 trains without privacy.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take defaults for what is not given.")] = False,
) -> None:
    """Write a commented config that runs, from a few questions.

    What an option gives is not asked. Without a terminal nothing is asked at all.
    """
    if file.exists():
        raise InputError("FILE", str(file), "exists already; name another file, or remove it")
    if owner is not None and clients is not None:
        raise InputError("--clients", clients, "goes by --owner already: one client for each value of that column")
    ask = _Questions(asks=not yes and sys.stdin.isatty())
    source = ask("Data: a CSV, TSV, JSONL or Parquet file, asset:NAME, or a hub id", data, "asset:rotten-tomatoes")
    columns = _columns(source)
    if columns is not None:
        typer.echo(f"{source}: {columns.table.rows} rows, columns {', '.join(columns.names)}")
    section = _data(ask, columns, text, label)
    lm = section["task"] == "causal-lm"
    name = ask("Model: asset:NAME, a hub id, or a folder", model, "asset:smollm2-135m" if lm else "asset:minilm-l6")
    partition = _partition(ask, columns, owner, clients)
    spent = ask("Epsilon that no client may exceed; 0 trains without privacy", epsilon, 8.0, float)
    content = _content(file.stem, source, name, section, partition, spent, columns.table.rows if columns else None)
    written = _commented(content, file)
    load_config(written)  # what is written runs; a wrong answer is told here
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(written, encoding="utf-8")
    typer.echo(f"{file} is written; run it with: fedlora run {file}")


class _Questions:
    """Asks for what no option gave."""

    def __init__(self, asks: bool) -> None:
        self.asks = asks

    def __call__(self, question: str, given: Any, default: Any, kind: type = str) -> Any:
        if given is not None:
            return given
        return typer.prompt(question, default=default, type=kind) if self.asks else default


def _columns(source: str) -> _Columns | None:
    """Read the columns of a file; None for an asset, a hub id or a folder."""
    from fedlora.data.files import SUFFIXES, first_line, read_file
    from fedlora.paths import find_path

    path = find_path(source, "--data")
    if path is None:
        if Path(source.removesuffix(".gz")).suffix.lower() in SUFFIXES:
            raise InputError("--data", source, "there is no such file; give the path of a file that exists")
        return None
    if path.is_dir():
        return None
    try:
        table = read_file(path)
    except Exception as error:  # the file may be damaged in any way
        raise InputError("--data", source, f"cannot be read ({first_line(error)}); fix the file") from None
    return _Columns(list(table.columns), table)


def _data(ask: _Questions, columns: _Columns | None, text: str | None, label: str | None) -> dict[str, str]:
    """Ask for the columns, and return them with the task that they make."""
    names = columns.names if columns else ()
    if columns and text is None and label in (None, _NONE) and "messages" in names:
        return {"task": "causal-lm", "messages": "messages"}
    if columns and text is None and label in (None, _NONE) and {"prompt", "answer"} <= set(names):
        return {"task": "causal-lm", "prompt": "prompt", "answer": "answer"}
    label_guess = columns.guess(_LABELS, _NONE) if columns else "label"
    other = next((name for name in names if name != label_guess), "text")
    chosen = ask("Column of the texts", text, columns.guess(_TEXTS, other) if columns else "text")
    of = ask("Column of the labels; none trains a language model", label, label_guess)
    if columns:
        columns.values(chosen, "--text")
    if of == _NONE:
        return {"task": "causal-lm", "text": chosen}
    task = "sequence-classification"
    if columns and _measured(columns.values(of, "--label")):
        task = "regression"
    return {"task": task, "text": chosen, "label": of}


def _measured(values: Sequence[Any]) -> bool:
    """Whether labels are numbers of which some are not whole."""
    try:
        numbers = [float(value) for value in values if value is not None]
    except (TypeError, ValueError):
        return False
    return any(number != int(number) for number in numbers if abs(number) < 1e300)


def _partition(ask: _Questions, columns: _Columns | None, owner: str | None, clients: int | None) -> dict[str, Any]:
    if owner is None and clients is None and columns:
        asked = ask("Column that names each row's owner; none divides the rows at random", None, _NONE)
        owner = None if asked == _NONE else asked
    if owner is not None:
        if columns:
            owners = {str(value) for value in columns.values(owner, "--owner") if value is not None}
            typer.echo(f"{len(owners)} owners")
        return {"kind": "natural", "column": owner}
    return {"kind": "iid", "clients": ask("Number of clients", clients, 10, int)}


def _content(
    name: str,
    source: str,
    model: str,
    columns: dict[str, str],
    partition: dict[str, Any],
    epsilon: float,
    rows: int | None,
) -> dict[str, dict[str, Any]]:
    """Return the sections of the config."""
    columns = dict(columns)
    task = columns.pop("task")
    about: dict[str, Any] = {"name": model, "task": task, "max_length": 128}
    if task != "causal-lm":
        about["pooling"] = "mean" if model in _SENTENCE_ENCODERS else "default"
    privacy: dict[str, Any] = {"mode": "none"}
    if epsilon:
        # Below 1 / n for every client, whatever its share of the rows.
        delta = min(1e-5, 10.0 ** -len(str(rows or 0)))
        privacy = {"mode": "example", "target_epsilon": epsilon, "target_delta": delta, "max_grad_norm": 1.0}
    run = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).lstrip("._-")
    usual = read_toml(_QUICKSTART)
    return {
        "run": {"name": run if run.isascii() and run else "run", "seed": 0, "rounds": 8},
        "model": about,
        "data": {"name": source, **columns},
        "data.partition": partition,
        "method": usual["method"],
        "client": usual["client"],
        "privacy": privacy,
    }


def _commented(content: dict[str, dict[str, Any]], file: Path) -> str:
    """Write TOML with the meaning of each key, from the config's own descriptions, above it."""
    lines = [
        f"# Run it:          fedlora run {file}",
        f"# Change a key:    fedlora run {file} --set run.rounds=20 --output runs/longer",
        "# Look at a key:   fedlora config client.local_steps      (fedlora config lists all keys)",
        "# Other methods:   fedlora methods",
    ]
    for section, keys in content.items():
        lines += ["", f"[{section}]"]
        meanings = _meanings(section)
        for key, value in keys.items():
            lines += [*textwrap.wrap(meanings[key], 100, initial_indent="# ", subsequent_indent="# ")]
            lines.append(tomli_w.dumps({key: value}).strip())
    return "\n".join(lines) + "\n"


def _meanings(section: str) -> dict[str, str]:
    """Return the description of each key of a section."""
    place: Any = Config
    for part in section.split("."):
        place = place.model_fields[part].annotation
    return {name: field.description or "" for name, field in place.model_fields.items()}
