"""``fedlora init``: a few questions, or options, and a commented config that runs."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import tomli_w
import typer

from fedlora.assets import find_model
from fedlora.cli.columns import NONE, Columns, find_columns
from fedlora.config import MAX_EPSILON, Config, load_common, load_config, read_toml
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
        float | None,
        typer.Option(min=0, max=MAX_EPSILON, help="Epsilon that no client may exceed; 0 trains without privacy."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: use defaults for options that are not given.")
    ] = False,
) -> None:
    """Write a commented config that runs, from a few questions.

    Options that are given are not asked, and a wrong answer is asked again. Without a terminal nothing is asked.
    """
    if file.exists():
        raise InputError("FILE", str(file), "exists already; name another file, or remove it")
    if owner is not None and clients is not None:
        raise InputError(
            "--clients", clients, "follows from --owner: there is one client for each value of that column"
        )
    terminal = sys.stdin.isatty()
    ask = _Questions(asks=not yes and terminal)
    source, columns = ask(
        "Data: a CSV, TSV, JSONL or Parquet file, asset:NAME, or a hub id", data, "asset:rotten-tomatoes", _source
    )
    if columns is not None:
        typer.echo(f"{source}: {columns.about}")
    section = _data(ask, columns, text, label, owner)
    lm = section["task"] == "causal-lm"
    usual = "asset:smollm2-135m" if lm else "asset:minilm-l6"
    name = ask("Model: asset:NAME, a hub id, or a folder", model, usual, _model)
    partition = _partition(ask, columns, owner, clients)
    spent = ask("Epsilon that no client may exceed; 0 trains without privacy", epsilon, 8.0, _epsilon, click.FLOAT)
    content = _content(file.stem, source, name, section, partition, spent, columns.table.rows if columns else None)
    written = _commented(content, file)
    load_config(written)  # what is written runs
    for line in _chosen(section, name, partition, columns):
        typer.echo(line)
    if not yes and not terminal:
        typer.echo("nothing was asked, since standard input is not a terminal")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(written, encoding="utf-8")
    typer.echo(f"{file} is written; run it with: fedlora run {file}")


class _Questions:
    """Asks for what no option gave, again and again until the answer can be used."""

    def __init__(self, asks: bool) -> None:
        self.asks = asks

    def __call__(
        self,
        question: str,
        given: Any,
        default: Any,
        read: Callable[[Any], Any] = lambda answer: answer,
        kind: click.ParamType = click.STRING,
    ) -> Any:
        """Return what ``read`` makes of the option, of the answer, or of the default.

        Raises
        ------
        InputError
            By ``read``, of what was not asked.
        """
        if given is not None or not self.asks:
            return read(default if given is None else given)

        def answered(words: Any) -> Any:
            try:
                return read(kind(words))
            except InputError as error:
                raise click.UsageError(str(error)) from None  # after which click asks again

        return typer.prompt(question, default=default, value_proc=answered)

    def label(self, columns: Columns, given: str | None, text: str, owner: str | None) -> str:
        """Ask for the column of the labels; raise InputError where nobody can be asked which of several it is."""
        found = [] if given else columns.labels((text, owner))
        if len(found) > 1 and not self.asks:
            counts = ", ".join(f"{name} ({len(columns.classes(name, '--label'))} values)" for name in found)
            raise InputError("--label", None, f"may be one of {counts}; name it by --label, or give --label {NONE}")
        usual = found[0] if found else NONE
        answer: str = self(_LABEL_QUESTION, given, usual, lambda name: _column(columns.label(name, text)))
        return answer


def _source(name: str) -> tuple[str, Columns | None]:
    """Return a source of data with its columns, if they are known."""
    _check(source=name)
    return name, find_columns(name)


def _model(name: str) -> str:
    find_model(name, "--model")
    _check(model=name)
    return name


def _column(name: str) -> str:
    _check(columns={"text": name})
    return name


def _clients(count: int) -> dict[str, Any]:
    """Return the partition of rows that are divided at random."""
    partition = {"kind": "iid", "clients": count}
    _check(partition=partition)
    return partition


def _epsilon(value: float) -> float:
    _check(epsilon=value)
    return value


def _check(
    source: str = "asset:rotten-tomatoes",
    model: str = "asset:minilm-l6",
    columns: dict[str, str] | None = None,
    partition: dict[str, Any] | None = None,
    epsilon: float = 8.0,
) -> None:
    """Refuse an answer that no config has, whatever the other answers are."""
    section = {"task": "sequence-classification", **(columns or {})}
    partition = partition or {"kind": "iid", "clients": 10}
    load_common(_commented(_content("run", source, model, section, partition, epsilon, None), Path("run.toml")))


def _data(
    ask: _Questions, columns: Columns | None, text: str | None, label: str | None, owner: str | None
) -> dict[str, str]:
    """Ask for the columns, and return them with the task that they make."""
    question = "Column of the texts"
    if columns is None:
        chosen, of = ask(question, text, "text", _column), ask(_LABEL_QUESTION, label, "label", _column)
        if of == NONE:
            return {"task": "causal-lm", "text": chosen}
        return {"task": "sequence-classification", "text": chosen, "label": of}
    if text is None and label in (None, NONE):
        if "messages" in columns.names:
            return {"task": "causal-lm", "messages": "messages"}
        if {"prompt", "answer"} <= set(columns.names):
            return {"task": "causal-lm", "prompt": "prompt", "answer": "answer"}
    usual = columns.usual_label((text, owner))
    chosen = ask(question, text, columns.text((usual, label, owner)), lambda name: _column(columns.texts(name)))
    of = ask.label(columns, label, chosen, owner)
    if of == NONE:
        return {"task": "causal-lm", "text": chosen}
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
        owners = ""
        if columns is not None and columns.table.rows:
            owners = f" ({format_count(len(columns.classes(partition['column'], '--owner')), 'owner')})"
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
        question = "Column that names each row's owner; none divides the rows at random"
        asked = ask(question, None, NONE, lambda name: name if name == NONE else _column(columns.owner(name)))
        owner = None if asked == NONE else asked
    elif owner is not None:
        _column(columns.owner(owner) if columns else owner)
    if owner is not None:
        return {"kind": "natural", "column": owner}
    partition: dict[str, Any] = ask("Number of clients", clients, 10, _clients, click.INT)
    return partition


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
        "# Look at a key:   fedlora config client.local_steps      (fedlora config --all lists all keys)",
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
