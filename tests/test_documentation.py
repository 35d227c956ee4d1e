"""Every block of code on README and the pages is checked: what can run is run, the rest is read by what would run it.

``tests/test_documented_runs.py`` runs whole pages, as somebody would who types what they say. Pages that others run are
in ``RUN_BY`` of ``tests/documented.py``. A command that no test runs has its reason in ``NOT_RUN`` there; it is still
parsed by its own parser, and its keys, files, targets and extras must be there. A block of a kind that nothing here
checks fails.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib
import io
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import typer

from fedlora.cli import app, parse_overrides
from fedlora.config import Config, load_config
from fedlora.deployment.config import load_server
from fedlora.node.config import load_node
from fedlora.study.config import StudyConfig, load_study
from tests.command import fedlora
from tests.configs import KEYS
from tests.documented import EXECUTED, NOT_RUN, PYTHON_RUN_BY, RUN_BY
from tests.pages import PAGES, ROOT, Block, Command, blocks, commands, in_block, in_language, inline_commands

ADDED_BY_PACKAGES = {"method.weight_power", "method.refactor_every"}
"""Keys of the methods that two pages write."""

SHOWN = {
    "README.md": "a CSV file",
    "docs/guides/gpus.md": "what a run says of its passes; test_step_memory.py compares such lines",
    "docs/tutorials/first-run.md": "what fedlora show prints; test_what_show_prints_is_shown",
    "docs/tutorials/own-data.md": "a CSV file and a dialogue; test_own_data_is_told_as_it_goes",
    "docs/tutorials/real-nodes.md": "what fedlora show prints; test_what_show_prints_is_shown",
    "docs/tutorials/two-machines.md": "files, and what commands print; tests/deployment has each of these commands",
    "docs/guides/node-owners.md": "what commands print; tests/deployment has each of these commands",
    "docs/tutorials/study.md": "what fedlora study and report print; test_documented_runs.py compares its first words",
    "docs/reference/source.md": "the folders; test_the_folders_are_there",
}
"""Pages with blocks of plain text, and what these are."""

COMMANDS = [command for page in PAGES for command in commands(str(page.relative_to(ROOT)))]


def test_there_are_pages_and_commands() -> None:
    assert len(PAGES) > 20
    assert len(COMMANDS) > 120
    assert len(in_language("toml")) > 8
    assert len(in_language("python")) > 8


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_a_block_is_of_a_kind_that_is_checked(block: Block) -> None:
    assert block.language in ("shell", "drawing", "toml", "python", "ini", "text"), (
        "nothing checks such a block; teach this file to"
    )
    if block.language == "text":
        assert block.page in SHOWN
    if block.language == "ini":
        configparser.ConfigParser(strict=False, interpolation=None).read_string(block.text)


@pytest.mark.parametrize("block", in_language("shell"), ids=str)
def test_a_shell_reads_it(block: Block) -> None:
    # A word such as ca | server | node stands for one of them.
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_command_is_run_or_says_why_not() -> None:
    used = set()
    for command in COMMANDS:
        reasons = {pattern for pattern in NOT_RUN if re.search(pattern, str(command))}
        used |= reasons
        run = command.page in EXECUTED or command.page in RUN_BY
        assert run or reasons, f"no test runs {command}, and nothing says why"
    assert not set(NOT_RUN) - used - {r"push-to-hub"}, "no command has this reason any longer"
    for page, test in RUN_BY.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8") or "example_method" in page
        assert (ROOT / test).is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--cases" in c.words], ids=str)
def test_a_benchmark_has_the_cases_that_a_command_names(command: Command) -> None:
    (module,) = (word for word in command.words if word.startswith("fedlora.experiments.benchmarks."))
    config = ROOT / "experiments" / "benchmarks" / f"{module.rpartition('.')[2]}.toml"
    known = {case["name"] for case in tomllib.loads(config.read_text(encoding="utf-8"))["cases"]}
    given = command.words[command.words.index("--cases") + 1 :]
    assert set(itertools.takewhile(lambda word: not word.startswith("-"), given)) <= known


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_taken_as_they_are_written(command: Command) -> None:
    first, *words = command.words
    assert first in CHECKS, f"nothing checks the command {first}; teach this file to"
    CHECKS[first](words)


@pytest.mark.parametrize("command", inline_commands(), ids=str)
def test_commands_in_the_text_are_there(command: Command) -> None:
    name, *words = command.words[1:]
    found = typer.main.get_command(app)
    assert isinstance(found, click.Group)
    if name.startswith("-"):
        return
    inner = found.commands[name]
    if isinstance(inner, click.Group) and words:
        inner = inner.commands[words[0] if words[0] in inner.commands else inner.default]  # type: ignore[attr-defined]
    options = {option for parameter in inner.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options | {"--help"}


def check_fedlora(words: list[str]) -> None:
    """Parse a command of fedlora's, and find its keys and files."""
    if "..." in words or "|" in words:
        known = set(typer.main.get_command(app).commands["keys"].commands) | {"server", "node", "keys"}  # type: ignore[attr-defined]
        assert {word for word in words if word not in ("...", "|", "run", "CONFIG")} <= known
        return  # a list of commands, in words
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        if words[0] not in command.commands and hasattr(command, "default"):
            words = [command.default, *words]  # fedlora node NODE.toml
        command = command.commands[words[0]]
        words = words[1:]
    context = command.make_context(command.name, list(words))  # refuses options and numbers of arguments
    for key in parse_overrides(list(context.params.get("set_") or [])):
        of_study = command.name == "study" and key.partition(".")[0] in StudyConfig.model_fields
        assert of_study or key in KEYS or key in ADDED_BY_PACKAGES or key.startswith("method.peft."), key
    for word in words:
        if word.startswith(("experiments/", "docs/")):
            assert (ROOT / word).exists(), word


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(words) <= targets
    assert words


def check_python(words: list[str]) -> None:
    """Parse what a module of ours is given by that module's own parser; see whose else it is."""
    assert words[0] == "-m"
    module, arguments = words[1], words[2:]
    if module in ("pip", "pytest"):
        CHECKS[module](arguments)
        return
    assert module.startswith("fedlora.experiments."), module

    class ParsedError(Exception):
        """Nothing is to be done with what was parsed."""

    def parsed(self: argparse.ArgumentParser, *_: object) -> None:
        _, unknown = argparse.ArgumentParser.parse_known_args(self, arguments)
        assert not unknown, unknown
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(ParsedError):
            importlib.import_module(module).main()


def check_pip(words: list[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install"
    wanted = [word for word in words[1:] if not word.startswith("--")]
    if "--constraint" in words:
        constraints = words[words.index("--constraint") + 1]
        assert (ROOT / constraints).is_file()
        wanted.remove(constraints)
    for word in wanted:
        extra = re.fullmatch(r"fedlora\[(.+)\]", word)
        if extra:
            assert set(extra[1].split(",")) <= set(settings["optional-dependencies"])
        else:
            assert word == "dist/fedlora-*.whl" or (ROOT / word).exists(), word


def check_pytest(words: list[str]) -> None:
    paths = [word for word in words if word.startswith("tests/")]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def check_flwr(words: list[str]) -> None:
    from flwr.cli.app import app as flower

    command: click.Command = typer.main.get_command(flower)
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, ["1" if word == "RUN_ID" else word for word in words])


def check_tool(_: list[str]) -> None:
    """A tool of the development environment, or the shell's own."""


def check_source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "fedlora": check_fedlora,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "pytest": check_pytest,
    "flwr": check_flwr,
    "source": check_source,
    **dict.fromkeys(("ruff", "mypy", "lint-imports", "export", "mkdir", "cat", "pgrep"), check_tool),
}
"""What checks a command, by its first word."""


@pytest.mark.parametrize("block", in_language("toml"), ids=str)
def test_toml_is_what_its_reader_takes(block: Block, tmp_path: Path) -> None:
    text = block.text
    content = tomllib.loads(text)
    file = tmp_path / "file.toml"
    file.write_text(text, encoding="utf-8")
    if {"model", "data", "method"} <= set(content):
        load_config(file)
    elif "study" in content:
        (tmp_path / "experiments").symlink_to(ROOT / "experiments")
        load_study(file)
    elif text.startswith("# server.toml"):
        load_server(file)
    elif "policy" in content:
        (tmp_path / content["data"]["path"]).write_text("text,label\n")
        load_node(file)
    elif set(content) <= set(Config.model_fields):
        for section, keys in content.items():
            for key in keys if section != "data" else [key for key in keys if key != "partition"]:
                assert f"{section}.{key}" in KEYS
    else:
        assert set(content) <= {"superlink", "report"}  # Flower's own file, and a part of a study


@pytest.mark.parametrize("block", in_language("python"), ids=str)
def test_python_is_python(block: Block) -> None:
    ast.parse("class Part:\n" + block.text if block.text.startswith("    ") else block.text)
    if block.page not in EXECUTED and block.page not in RUN_BY:
        assert block.page in PYTHON_RUN_BY, "no test runs it, and tests/documented.py names none"
        file, _, test = PYTHON_RUN_BY[block.page].partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_folders_are_there() -> None:
    (block,) = in_language("text", "docs/reference/source.md")
    for folder in re.findall(r"^(\w+)/", block.text, re.MULTILINE):
        assert (ROOT / folder).is_dir()


@pytest.mark.parametrize("page", ["docs/tutorials/first-run.md", "docs/tutorials/real-nodes.md"])
def test_what_show_prints_is_shown(page: str) -> None:
    """What is printed at the end of a run is named as the page names it."""
    files = [path for folder in ("cli", "tasks") for path in (ROOT / "fedlora" / folder).glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for block in in_language("text", page):
        names = {line.split()[0] for line in block.text.splitlines() if re.match(r"[a-z]+ {2,}\S", line)}
        assert len(names) > 5
        assert not {name for name in names if name not in source}


def test_own_data_is_told_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "docs/tutorials/own-data.md"
    example, asked = (block.text for block in in_language("text", page))
    monkeypatch.chdir(tmp_path)
    Path("reviews.csv").write_text(example)
    Path("notes.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    given = [command.words[1:] for command in commands(page) if command.words[1] == "init"]
    assert len(given) == 3
    for number, words in enumerate(given):
        done = fedlora("init", f"{number}.toml", *words[2:], "--yes" if "--yes" not in words else "-y")
        assert done.code == 0, done.err
    config = load_config("1.toml")
    assert (config.data.partition.column, config.data.label, config.data.text) == ("clinic", "verdict", "review")
    assert load_config("2.toml").model.task == "causal-lm"
    dialogue = asked.splitlines()[1:-3]  # between how many rows the file has, and what was chosen
    answers = [line.rpartition("]:")[2].strip() for line in dialogue if "]:" in line]
    typed = io.StringIO("\n".join([*answers, ""]))
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", typed)
    done = fedlora("init", "asked.toml", "--data", "reviews.csv")
    assert done.code == 0, done.err
    # The user's line breaks are not in the output.
    told = [f"{line.partition(']:')[0]}]: " if "]:" in line else f"{line}\n" for line in dialogue]
    assert done.out.partition("\n")[2].startswith("".join(told))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "fedlora run a.toml --set x=1 \\\n    --output b    # why\n",
            [("fedlora", "run", "a.toml", "--set", "x=1", "--output", "b")],
        ),
        ("a b && c 'd e'\n", [("a", "b"), ("c", "d e")]),
        ('RUN="python -m x"\n$RUN --output y\n', [("python", "-m", "x", "--output", "y")]),
        ("cat > file <<END\nfedlora is not called\nEND\nfedlora runs\n", [("cat",), ("fedlora", "runs")]),
    ],
)
def test_commands_are_found(text: str, words: list[tuple[str, ...]]) -> None:
    assert [command.words for command in in_block(Block("page", 1, "shell", text))] == words
