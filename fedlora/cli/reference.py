"""``fedlora config`` and ``fedlora methods``: print the keys of a config and the methods, from the code itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedlora.config import Key, MethodSection, all_keys, find_keys, section_title

if TYPE_CHECKING:
    from fedlora.methods import Method

console = Console()


def config(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="A key or a section; all of them by default.")
    ] = None,
) -> None:
    """Describe the keys of a config: their types, defaults and meaning."""
    # Methods have keys of their own. Their import takes seconds.
    from fedlora.methods import methods as find_methods

    found = find_methods()
    keys = all_keys({name: method.Options for name, method in found.items()})
    chosen = keys if key is None else find_keys(key, keys)
    if key is not None and all(one.name == key for one in chosen):
        for one in chosen:
            _details(one)
        return
    for (section, method), rows in groupby(chosen, lambda one: (one.name.rpartition(".")[0], one.method)):
        title = f"{found[method].title} (method.name = {method})" if method else section_title(section)
        console.print(f"[bold]\\[{section}][/bold] {escape(title.partition(': ')[2] or title)}")
        table = Table("key", "default", "type", "meaning", box=None, pad_edge=False)
        for row in rows:
            name = row.name.rpartition(".")[2]
            table.add_row(*map(escape, (name, row.default, row.type, row.description)))
        console.print(table, "")


def _details(key: Key) -> None:
    of = f" (method.name = {key.method})" if key.method else ""
    console.print(f"[bold]{escape(key.name)}[/bold]{of}", highlight=False)
    for title, text in (("type", key.type), ("range", key.bounds), ("default", key.default or "none")):
        if text:
            console.print(f"  {title:<8} {escape(text)}", highlight=False)
    console.print(f"  {escape(key.description)}", highlight=False)


_PAGE = """\
# Methods

`fedlora methods --markdown > docs/methods.md` writes this page from the methods' own files.

m and n are a layer's outputs and inputs, r is the rank. The trained head is sent beside what the table says.
*Exact* means that aggregation adds no error: the server's model is the mean of the clients' models, or holds what each
of them sent unchanged.

{table}

*Rates* are the default learning rates with AdamW and with SGD. `fedlora config method` describes the keys.

| `method.name` | rates | keys of its own |
|---|---|---|
{options}"""

METHODS_HEAD = """\
| `method.name` | what | sent, a layer and round | exact | mixed ranks | example-level DP | paper |
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
        table = Table("method", "what", "paper", box=None, pad_edge=False)
        for name, method in find_methods().items():
            table.add_row(name, method.title, method.paper)
        console.print(table)
    for place, why in broken_methods().items():
        typer.echo(f"left out, {place}: {why}", err=True)
