"""What mkdocs adds to the pages in docs/: the reference, made from the code, and the results from experiments/.

A hook of mkdocs (mkdocs.yml names it). At the end it refuses a site that would load anything from elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("studies", "benchmarks")
"""Folders of experiments/ whose pages and pictures are shown below results/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written by the code, and those of experiments/."""
    made = {"reference/config.md": _config_page(), "reference/cli.md": _cli_page()}
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = _notebook_page(path)
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for folder in RESULTS:
        top = ROOT / "experiments" / folder
        pages, pictures = sorted(top.glob("*.md")), sorted(top.rglob("*.png"))
        for path in [*pages, *pictures]:
            place = f"results/{folder}/{path.relative_to(top)}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to pages of the site: to a folder's page, a notebook's, and for experiments/ to results/."""
    markdown = re.sub(r"(\]\([\w./]*notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)
    markdown = re.sub(r"\]\((\w+)/\)", r"](\1/README.md)", markdown)
    return re.sub(rf"\]\(\.\./((?:\.\./)*)experiments/({'|'.join(RESULTS)})/", r"](\1results/\2/", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the names alone of docstrings' cross-references: ``:class:`~a.B``` as ``a.B``."""
    return re.sub(r":\w+:<code>[~!]?([^<]+)</code>", r"<code>\1</code>", html)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that loads anything from elsewhere."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            found = re.search(_LOADS, path.read_text(encoding="utf-8"))
            if found:
                raise PluginError(f"{path.name} loads {found.group(0)[:120]}")


_LOADS = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//[^>]*"
    r"|<link\b(?=[^>]*\brel=\"(?:stylesheet|preconnect|preload|icon)\")[^>]*\bhref=\"(?:https?:)?//[^>]*"
    r"|url\([\"']?(?:https?:)?//[^)]*"
)


def _config_page() -> str:
    from fedlora.cli.reference import config_page
    from fedlora.config import all_keys
    from fedlora.methods import methods

    found = methods()
    return config_page(all_keys({name: method.Options for name, method in found.items()}), found)


def _notebook_page(path: Path) -> str:
    """Return a notebook's cells as a page; it has no outputs, which the reader makes."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f"[This page as a notebook]({path.name})"]) + "\n"


def _cli_page() -> str:
    from fedlora.cli import app

    lines = [
        "# Command line",
        "",
        "`fedlora --help` and `fedlora COMMAND --help` print the same in the terminal. Commands exit with 0 when done,",
        "with 2 for a mistake in the input, with an error of one line, and with 1 for anything else.",
        "`fedlora --install-completion` teaches your shell the commands, their options, and the keys of a config.",
    ]
    for name, command in _commands(typer.main.get_command(app)):
        lines += ["", f"## fedlora {name}", "", str(command.help), "", *_parameters(command), "", *_examples(name)]
    return "\n".join(lines) + "\n"


def _commands(group: click.Command, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    assert isinstance(group, click.Group)
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _parameters(command: click.Command) -> list[str]:
    """Return a command's usage, and a table of what it takes."""
    with click.Context(command, info_name=f"fedlora {command.name}") as context:
        usage = " ".join(command.collect_usage_pieces(context))
        rows = [f"| `{_name(p, context)}` | {getattr(p, 'help', None) or ''} |" for p in command.params]
    return [f"Usage: `{usage}`", "", "| parameter | meaning |", "|---|---|", *rows]


def _name(parameter: click.Parameter, context: click.Context) -> str:
    if isinstance(parameter, click.Option):
        value = "" if parameter.is_flag else f" {parameter.make_metavar(context)}"
        return ", ".join(parameter.opts) + value
    return parameter.make_metavar(context)


def _examples(name: str) -> list[str]:
    from fedlora.cli.examples import EXAMPLES

    return [f"    {example}" for example in EXAMPLES[name]]
