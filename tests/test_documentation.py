"""The pages of the documentation: commands that there are, keys that there are, configs that load, Python that parses.

What the tutorials show is run by other tests: tests/cli/test_looking_at_runs.py goes from ``fedlora init`` to ``fedlora
show``, tests/deployment/ goes from keys to a run on nodes, tests/test_adding_a_method.py runs the guide to a method.
"""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from fedlora.cli import app, parse_overrides
from fedlora.cli.init import init
from fedlora.config import Config, load_config
from fedlora.deployment.config import load_server
from fedlora.node.config import load_node
from tests.command import fedlora
from tests.configs import KEYS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")})
ADDED_BY_PACKAGES = {"method.weight_power", "method.refactor_every"}
"""Keys of the methods that two pages write."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield each command of fedlora on a page, with the page's name: lines that are indented, as code is."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ {4,}(fedlora .+)$", text, re.MULTILINE):
            for part in re.split(r"&&|\|(?= )", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["fedlora"] and "..." not in words:
                    yield named(page), words[1:]


def blocks(language: str) -> list[tuple[str, str]]:
    """Return the code blocks of a language, with their pages."""
    pattern = rf"^```{language}\n(.*?)^```"
    return [
        (named(page), block)
        for page in PAGES
        for block in re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ]


COMMANDS = list(commands())


def test_there_are_pages_and_commands() -> None:
    assert len(PAGES) > 15
    assert len(COMMANDS) > 50
    assert len(blocks("toml")) > 8
    assert len(blocks("python")) > 8


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS])
def test_commands_are_taken_as_they_are_written(page: str, words: list[str]) -> None:
    if "|" in words:
        return  # a list of commands, in words
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        if words[0] not in command.commands and hasattr(command, "default"):
            words = [command.default, *words]  # fedlora node NODE.toml
        command = command.commands[words[0]]
        words = words[1:]
    context = command.make_context(command.name, list(words))  # refuses options and numbers of arguments
    for key in parse_overrides(list(context.params.get("set_") or [])):
        assert key in KEYS or key in ADDED_BY_PACKAGES or key.startswith("method.peft."), key
    for word in words:
        if word.startswith(("experiments/", "docs/")):
            assert (ROOT / word).exists()


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_toml_is_what_its_reader_takes(page: str, text: str, tmp_path: Path) -> None:
    content = tomllib.loads(text)
    file = tmp_path / "file.toml"
    file.write_text(text, encoding="utf-8")
    if {"model", "data", "method"} <= set(content):
        load_config(file)
    elif text.startswith("# server.toml"):
        load_server(file)
    elif "policy" in content:
        (tmp_path / content["data"]["path"]).write_text("text,label\n")
        load_node(file)
    elif set(content) <= set(Config.model_fields):
        for section, keys in content.items():
            for key in keys if section != "data" else [key for key in keys if key != "partition"]:
                assert f"{section}.{key}" in KEYS


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_is_python(page: str, text: str) -> None:
    ast.parse("class Part:\n" + text if text.startswith("    ") else text)


def test_own_data_is_told_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "tutorials" / "own-data.md").read_text(encoding="utf-8")
    example, asked = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("reviews.csv").write_text(example)
    Path("notes.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    given = [words for name, words in COMMANDS if name.endswith("own-data.md") and words[0] == "init"]
    assert len(given) == 3
    for number, words in enumerate(given):
        done = fedlora("init", f"{number}.toml", *words[2:], "--yes" if "--yes" not in words else "-y")
        assert done.code == 0, done.err
    config = load_config("1.toml")
    assert (config.data.partition.column, config.data.label, config.data.text) == ("clinic", "verdict", "review")
    assert load_config("2.toml").model.task == "causal-lm"
    prompts: list[str] = []

    def answer(question: str, default: object, **_: object) -> object:
        prompts.append(f"{question} [{default}]:")
        return "clinic" if "owner" in question else default

    monkeypatch.setattr("typer.prompt", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    init(Path("asked.toml"), data="reviews.csv")
    told = [line.removesuffix(" clinic") for line in asked.splitlines() if "]:" in line]
    assert prompts == told
