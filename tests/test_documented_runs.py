"""README, tutorials and guides as somebody types them: every command and all Python, in the order of the page.

The configs are the shipped ones, with one layer of MiniLM, few reviews and two rounds, so that a page takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.command import fedlora
from tests.documented import EXECUTED, NOT_RUN
from tests.pages import ROOT, Command, blocks, commands, in_block, in_language

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cached", "bare")]

SHORT: dict[str, Any] = {
    "run": {"rounds": 2},
    "model": {"num_hidden_layers": 1, "max_length": 16},
    "data": {"max_examples": 600, "max_test_examples": 40},
    "client": {"batch_size": 8, "local_steps": 1},
    "simulation": {"workers": 0},
}
"""What makes a config short."""

AXES = {"method.name": ["ffa-lora"], "privacy.target_epsilon": [3.0, 8.0]}
"""Of a study that is short."""

VALIDATED = "docs/index.md"
"""The page whose runs have validation examples: another one exports their best round."""

MORE = {"init": ["--yes"], "audit": ["--canaries", "40"]}
"""What commands are given beside what the page says: answers, and less work."""

ROWS = 240
"""Of a file that a page asks for."""


def shorten(path: Path) -> None:
    """Write a config or a study anew, shorter."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    if "study" in content:
        merged = _merged(content, {"base": SHORT, "axes": AXES})
    else:
        merged = _merged(content, SHORT)
        merged["data"]["partition"].pop("min_examples", None)
    path.write_text(tomli_w.dumps(merged), encoding="utf-8")


def _merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(content)
    for key, value in changes.items():
        found[key] = _merged(found.get(key, {}), value) if isinstance(value, Mapping) else value
    return found


def lay_folder(folder: Path, page: str) -> None:
    """Make a checkout's experiments/, shorter, and the files that a page takes for given."""
    shutil.copytree(
        ROOT / "experiments", folder / "experiments", ignore=shutil.ignore_patterns("results", "*.py", "*.md")
    )
    for name in ("quickstart.toml", "studies/smoke.toml"):
        shorten(folder / "experiments" / name)
    if page == VALIDATED:
        config = folder / "experiments" / "quickstart.toml"
        content = tomllib.loads(config.read_text(encoding="utf-8"))
        config.write_text(tomli_w.dumps(_merged(content, {"data": {"validation": 0.1}})), encoding="utf-8")
    (example, *_) = in_language("text", "docs/tutorials/own-data.md")
    head, *rows = example.text.splitlines()
    clinics = ("north", "south", "east", "west")
    lines = [rows[n % 2].rpartition(",")[0] + f",{clinics[n % 4]}" for n in range(ROWS)]
    (folder / "reviews.csv").write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    (folder / "notes.jsonl").write_text('{"text": "a note"}\n' * ROWS, encoding="utf-8")


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    """Where pages were run, by page."""
    return {}


def typed(page: str, folder: Path) -> str:
    """Do in a folder what a page says; return what was printed."""
    printed = []
    for block in blocks():
        if block.page != page or block.language not in ("shell", "python", "toml"):
            continue
        named = re.match(r"# (\w+\.toml)$", block.text, re.MULTILINE)
        if block.language == "toml":
            if named:
                (folder / named[1]).write_text(block.text, encoding="utf-8")
            continue
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, str(block), "exec"), {"__name__": "page"})
            printed.append(out.getvalue())
            continue
        for command in in_block(block):
            if not any(re.search(pattern, str(command)) for pattern in NOT_RUN):
                printed.append(_done(command, folder))
    return "\n".join(printed)


def _done(command: Command, folder: Path) -> str:
    words = list(command.words)
    if words == ["make", "quickstart"]:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        recipe = re.search(r"^quickstart:.*\n\t\$\(BIN\)/(.+)", makefile, re.MULTILINE)
        assert recipe
        words = recipe[1].split()
    assert words[0] == "fedlora", f"{command} is no command of fedlora's: give a reason in tests/documented.py"
    words = [*words[1:], *MORE.get(words[1], [])]
    if words[0] == "init":
        (folder / words[1]).unlink(missing_ok=True)
    done = fedlora(*dict.fromkeys(words) if words[0] == "init" else words)
    assert done.code == 0, f"{command}\n{done.err}"
    if words[0] == "init":
        shorten(folder / words[1])
    if "--output" in words:
        assert (folder / words[words.index("--output") + 1]).exists()
    return done.out


@pytest.mark.parametrize("page", sorted(EXECUTED, key=lambda page: EXECUTED[page] != ""))
def test_a_page_does_what_it_says(
    page: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commands(page)
    folder = folders[page] = tmp_path_factory.mktemp("page")
    lay_folder(folder, page)
    if EXECUTED[page]:
        before = folders.get(EXECUTED[page])
        if before is None:
            pytest.skip(f"needs what {EXECUTED[page]} makes: run them together")
        shutil.copytree(before / "runs", folder / "runs")
    monkeypatch.chdir(folder)
    printed = " ".join(typed(page, folder).split())
    assert printed
    if page.endswith("study.md"):
        (shown,) = in_language("text", page)
        head, *_ = shown.text.splitlines()
        assert " ".join(head.split()) in printed
