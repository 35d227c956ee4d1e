"""``fedlora init``: a few questions, or options, and a commented config that runs."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from fedlora.cli.columns import NONE, Columns, check_classes
from fedlora.config import Config, load_config, read_toml
from fedlora.errors import InputError, plain_text
from fedlora.summaries import format_count

_SENTENCE_ENCODERS = ("asset:minilm-l6", "asset:mpnet-base")
"""Models without a trained pooler, whose tokens are averaged."""
_QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.toml"
"""Where method and local training come from: an example that is known to work."""
_LABEL_QUESTION = "Column of the labels; none trains a language model"
_LABEL_HELP = (
    "Column of the labels; none trains a language model. By default the one named label, class, sentiment or "
    "similar, otherwise the only other column with 2 to 50 values and at least five rows per value."
)


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The config to write.")] = Path("fedlora.toml"),
    data: Annotated[
        str | None, typer.Option(help="A CSV, TSV, JSONL or Parquet file, asset:NAME, or a hub id.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of the texts; by default the one named text, review or similar, otherwise the longest texts.",
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help=_LABEL_HELP)] = None,
    model: Annotated[str | None, typer.Option(help="asset:NAME, a hub id, or a folder.")] = None,
    owner: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column that names each row's owner: one client per owner.")
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Number of clients among which rows are divided at random.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(min=0, help="Epsilon that no client may exceed; 0 trains without privacy.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: use defaults for options that are not given.")
    ] = False,
) -> None:
    """Write a commented config that runs, from a few questions.

    Options that are given are not asked. Without a terminal nothing is asked.
    """
    if file.exists():
        raise InputError("FILE", str(file), "exists already; name another file, or remove it")
    if owner is not None and clients is not None:
        raise InputError(
            "--clients", clients, "follows from --owner: there is one client for each value of that column"
        )
    terminal = sys.stdin.isatty()
    ask = _Questions(asks=not yes and terminal)
    source = ask("Data: a CSV, TSV, JSONL or Parquet file, asset:NAME, or a hub id", data, "asset:rotten-tomatoes")
    columns = _columns(source)
    if columns is not None:
        typer.echo(f"{source}: {columns.table.rows} rows, columns {', '.join(columns.names)}")
    section = _data(ask, columns, text, label, owner)
    lm = section["task"] == "causal-lm"
    name = ask("Model: asset:NAME, a hub id, or a folder", model, "asset:smollm2-135m" if lm else "asset:minilm-l6")
    partition = _partition(ask, columns, owner, clients)
    spent = ask("Epsilon that no client may exceed; 0 trains without privacy", epsilon, 8.0, float)
    content = _content(file.stem, source, name, section, partition, spent, columns.table.rows if columns else None)
    written = _commented(content, file)
    config = load_config(written)  # what is written runs; a wrong answer is reported here
    if config.data.text == config.data.label:
        raise InputError("--label", config.data.label, "is the column of the texts; name another one")
    for line in _chosen(section, name, partition, columns):
        typer.echo(line)
    if not yes and not terminal:
        typer.echo("nothing was asked, since standard input is not a terminal")
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

    def label(self, columns: Columns, given: str | None, taken: tuple[str | None, ...]) -> str:
        """Ask for the column of the labels; raise InputError where nobody can be asked which of several it is."""
        found = [] if given else columns.labels(taken)
        if len(found) > 1 and not self.asks:
            counts = ", ".join(f"{name} ({len(columns.classes(name, '--label'))} values)" for name in found)
            raise InputError("--label", None, f"may be one of {counts}; name it by --label, or give --label {NONE}")
        answer: str = self(_LABEL_QUESTION, given, found[0] if found else NONE)
        return answer


def _columns(source: str) -> Columns | None:
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
    return Columns(table)


def _data(
    ask: _Questions, columns: Columns | None, text: str | None, label: str | None, owner: str | None
) -> dict[str, str]:
    """Ask for the columns, and return them with the task that they make."""
    question = "Column of the texts"
    if columns is None:
        chosen, of = ask(question, text, "text"), ask(_LABEL_QUESTION, label, "label")
        if of == NONE:
            return {"task": "causal-lm", "text": chosen}
        return {"task": "sequence-classification", "text": chosen, "label": of}
    if text is None and label in (None, NONE):
        if "messages" in columns.names:
            return {"task": "causal-lm", "messages": "messages"}
        if {"prompt", "answer"} <= set(columns.names):
            return {"task": "causal-lm", "prompt": "prompt", "answer": "answer"}
    usual = columns.usual_label((text, owner))
    chosen = ask(question, text, columns.text((usual, label, owner)))
    columns.values(chosen, "--text")
    of = ask.label(columns, label, (chosen, owner))
    if of == NONE:
        return {"task": "causal-lm", "text": chosen}
    check_classes(columns, of)
    measured = _measured(columns.values(of, "--label"))
    return {"task": "regression" if measured else "sequence-classification", "text": chosen, "label": of}


def _chosen(data: dict[str, str], model: str, partition: dict[str, Any], columns: Columns | None) -> list[str]:
    """Say what the config was made of, and how to choose otherwise."""
    parts = [f"task {data['task']}", f"model {model}"]
    for key, column in data.items():
        if key == "label" and columns and data["task"] != "regression":
            column += _listed(columns.classes(column, "--label"))
        if key != "task":
            parts.append(f"{key} {column}")
    if "label" not in data:
        parts.append("no label")
    if partition["kind"] == "natural":
        owners = f" ({format_count(len(columns.classes(partition['column'], '--owner')), 'owner')})" if columns else ""
        parts.append(f"owner {partition['column']}{owners}")
    else:
        parts.append(f"no owner: rows at random to {format_count(partition['clients'], 'client')}")
    return [
        "chosen: " + ", ".join(parts),
        "to choose otherwise, edit the file, or remove it and give --model, --text, --label, --owner or --clients",
    ]


def _listed(classes: Sequence[str]) -> str:
    """Write the number of classes, and the first of them; "" where labels are no words."""
    words = [" ".join(plain_text(name).split()) for name in classes[:5]]
    shown = ", ".join(word if len(word) <= 20 else f"{word[:17]}..." for word in words)
    return f" ({len(classes)} classes: {shown}{', ...' if len(classes) > 5 else ''})" if classes else ""


def _measured(values: Sequence[Any]) -> bool:
    """Whether labels are numbers of which some are not whole."""
    try:
        numbers = [float(value) for value in values if value is not None]
    except (TypeError, ValueError):
        return False
    return any(number != int(number) for number in numbers if abs(number) < 1e300)


def _partition(ask: _Questions, columns: Columns | None, owner: str | None, clients: int | None) -> dict[str, Any]:
    if owner is None and clients is None and columns:
        asked = ask("Column that names each row's owner; none divides the rows at random", None, NONE)
        owner = None if asked == NONE else asked
    if owner is not None:
        if columns:
            columns.values(owner, "--owner")
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
