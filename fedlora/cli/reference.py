"""``fedlora config`` and ``fedlora methods``: print the keys of a config and the methods, from the code itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedlora.cli.tables import is_terminal, print_table
from fedlora.config import Config, Key, MethodSection, all_keys, find_keys, section_title
from fedlora.tasks import tasks

if TYPE_CHECKING:
    from fedlora.methods import Method

console = Console()

_READ_BY_SOME = ("model.quantization",)
"""Keys outside ``[method]`` that not every method reads."""


def _complete(begun: str) -> list[str]:
    """Return the keys and sections that begin so; keys of single methods are left out, whose import takes seconds."""
    keys = all_keys({})
    return [name for name in dict.fromkeys([*(k.section for k in keys), *(k.name for k in keys)]) if begun in name]


def config(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="A key or a section; the sections by default.",
            autocompletion=_complete,
            show_default=False,
        ),
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="List the keys of all sections, and of all methods.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of the documentation.")] = False,
) -> None:
    """Describe the keys of a config: their types, defaults, units and meaning, and which methods read them.

    Without a key it lists the sections.
    """
    found: Mapping[str, type[Method]] = {}
    keys = all_keys({})
    if key is None and not whole and not as_markdown:
        _sections(keys)
        return
    if as_markdown or not _read_by_all(key, keys):
        # Methods have keys of their own. Their import takes seconds.
        from fedlora.methods import methods as find_methods

        found = find_methods()
        keys = all_keys({name: method.Options for name, method in found.items()})
    chosen = keys if key is None else find_keys(key, keys)
    if as_markdown:
        typer.echo(config_page(chosen, found))
        return
    if key is not None and all(one.name == key for one in chosen):
        for one in chosen:
            _details(one, found)
        return
    for title, rows in _by_section(chosen, found):
        section, _, meaning = title.partition(" ")
        _say(f"[bold]{escape(section)}[/bold] {escape(meaning)}")
        defaults = (f"{row.default} {row.unit}" if row.default and row.unit else row.default for row in rows)
        cells = [(row.last, default, row.type, row.description) for row, default in zip(rows, defaults, strict=True)]
        print_table(console, ("key", "default", "type", "meaning"), cells)
        _say("")


def _sections(keys: Iterable[Key]) -> None:
    """Print the sections, and how to see the keys of one."""
    rows = []
    for section, own in groupby(keys, lambda key: key.section):
        more = "; each method has keys of its own too" if section == "method" else ""
        rows.append((section, str(len(list(own))), f"{_meaning(section).removesuffix('.')}{more}"))
    print_table(console, ("section", "keys", "meaning"), rows, right=("keys",))
    for line in ("", *_HOW):
        _say(line)


_HOW = (
    "fedlora config SECTION  lists the keys of a section, as in: fedlora config privacy",
    "fedlora config KEY      describes a key, as in: fedlora config client.local_steps",
    "fedlora config --all    lists all keys",
)


def _say(line: str) -> None:
    """Print a line of markup, which is wrapped on a terminal alone."""
    console.print(line, highlight=False, soft_wrap=not is_terminal(console))


def _read_by_all(name: str | None, keys: Iterable[Key]) -> bool:
    """Whether this is a key that every method reads, or a section without a method's own keys."""
    if name is None or name in _READ_BY_SOME or name.partition(".")[0] == "method":
        return False
    return any(name in (key.name, key.section) for key in keys)


def _by_section(keys: Iterable[Key], methods: Mapping[str, type[Method]]) -> Iterator[tuple[str, list[Key]]]:
    """Yield the title of each section, and of each method's part of ``[method]``, with its keys."""
    for (section, method), rows in groupby(keys, lambda key: (key.section, key.method)):
        title = f"{methods[method].title} (method.name = {method})" if method else ""
        yield f"[{section}] {title.partition(': ')[2] or title or _meaning(section)}", list(rows)


def _meaning(section: str) -> str:
    """Say what a section is for."""
    title = section_title(section)
    return title.partition(": ")[2] or title


def _details(key: Key, methods: Mapping[str, type[Method]]) -> None:
    of = f" (method.name = {key.method})" if key.method else ""
    _say(f"[bold]{escape(key.name)}[/bold]{of}")
    facts = (
        ("type", key.type),
        ("range", key.bounds),
        ("unit", key.unit),
        ("default", key.default or "none"),
        ("read by", readers(key, methods)),
    )
    for title, text in facts:
        if text:
            _say(f"  {title:<8} {escape(text)}")
    _say(f"  {escape(key.description)}")


def readers(key: Key, methods: Mapping[str, type[Method]]) -> str:
    """Say which methods read a key, and with which tasks.

    Parameters
    ----------
    key : Key
    methods : Mapping of str to type of Method
        All methods by name.
    """
    reading = [name for name, method in methods.items() if _reads(method, key)]
    left = [name for name in methods if name not in reading]
    if not left:
        words = "all methods"
    elif len(left) < len(reading):
        words = f"all methods but {', '.join(left)}"
    else:
        words = ", ".join(reading)
    of = [name for name, task in tasks().items() if key.name in task.keys]
    return f"{words}; tasks {', '.join(of)}" if of else words


def _reads(method: type[Method], key: Key) -> bool:
    """Whether a method reads a key; with the defaults of its other keys, if that matters."""
    if key.method:
        return key.last in _own_keys(method)
    if key.name in _READ_BY_SOME:
        return method.quantized
    if key.section != "method":
        return True
    sections = {"model": {"name": "model"}, "data": {"name": "data"}, "method": {"name": method.name}}
    unused = method.unused(Config.model_validate(sections))
    return not any(key.last in names.split() for names, _ in unused)


_CONFIG_HEAD = """\
# Config keys

`fedlora config --markdown` writes this page from the code. `fedlora config KEY` describes one key in the terminal, and
`fedlora config SECTION` lists the keys of a section.

A config is a TOML file. `--set section.key=value` overrides a key of it. A key without a default is required, unless
its meaning says what applies without it."""


def config_page(keys: Iterable[Key], methods: Mapping[str, type[Method]]) -> str:
    """Return the reference of config keys as Markdown: one table for each section."""
    lines = [_CONFIG_HEAD]
    for title, rows in _by_section(keys, methods):
        section, _, meaning = title.partition(" ")
        of = f" of {rows[0].method}" if rows[0].method else ""
        sentence = meaning[0].upper() + meaning[1:].removesuffix(".") + "."
        lines += ["", f"## `{section}`{of}", "", sentence, "", _cells(*_COLUMNS), "|---" * len(_COLUMNS) + "|"]
        for row in rows:
            kind = f"{row.type}, {row.bounds}" if row.bounds else row.type
            default = f"`{row.default}`" if row.default not in ("", "required") else row.default
            cells = (f"`{row.last}`", row.description, kind, default, row.unit, readers(row, methods))
            lines.append(_cells(*(cell.replace("|", "\\|") for cell in cells)))
    return "\n".join(lines)


_COLUMNS = ("key", "meaning", "type", "default", "unit", "read by")

_PAGE = """\
# Methods

m and n are a layer's outputs and inputs, r is the rank. The trained head is sent beside what the table says.
*Exact* means that aggregation adds no error: the server's model is the mean of the clients' models, or holds what each
of them sent unchanged.

{table}

*Rates* are the default learning rates with AdamW and with SGD. `fedlora config method` describes the keys.

| `method.name` | rates | keys of its own |
|---|---|---|
{options}"""

METHODS_HEAD = """\
| `method.name` | what | sent per layer and round | exact | mixed ranks | example-level DP | paper |
|---|---|---|---|---|---|---|"""
"""Heading of the table of methods, which stands in README, too."""


def _own_keys(method: type[Method]) -> list[str]:
    """Return the keys of ``[method]`` that this method adds to those of all methods."""
    return [key for key in method.Options.model_fields if key not in MethodSection.model_fields]


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _row(method: type[Method]) -> str:
    """Return a method's row of the table of methods."""
    paper = method.paper.removeprefix("arXiv ")
    link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper != method.paper else method.paper
    facts = ["yes" if fact else "no" for fact in (method.exact, method.mixed_ranks, method.dp)]
    return _cells(f"`{method.name}`", method.title, method.sends, *facts, link)


def _options_row(method: type[Method]) -> str:
    """Return a method's row of the table of rates and keys."""
    rates = [f"{method.learning_rates[name]:g}" for name in ("adamw", "sgd") if name in method.learning_rates]
    return _cells(f"`{method.name}`", ", ".join(rates), ", ".join(f"`{key}`" for key in _own_keys(method)))


def _page(methods: Iterable[type[Method]]) -> str:
    found = list(methods)
    table = "\n".join([METHODS_HEAD, *map(_row, found)])
    return _PAGE.format(table=table, options="\n".join(map(_options_row, found)))


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print all facts as JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/methods.md.")] = False,
) -> None:
    """List the methods."""
    from fedlora.methods import broken_methods
    from fedlora.methods import methods as find_methods

    if as_json:
        rows = [
            {
                "name": name,
                "title": method.title,
                "paper": method.paper,
                "exact": method.exact,
                "mixed_ranks": method.mixed_ranks,
                "dp": method.dp,
                "options": _own_keys(method),
            }
            for name, method in find_methods().items()
        ]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif as_markdown:
        typer.echo(_page(find_methods().values()))
    else:
        cells = [(name, method.title, method.paper) for name, method in find_methods().items()]
        print_table(console, ("method", "what", "paper"), cells)
    for place, why in broken_methods().items():
        typer.echo(f"left out, {place}: {why}", err=True)
