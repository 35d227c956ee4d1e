"""Tables of all commands: nothing is cut or wrapped in a pipe, and a terminal's width is kept."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from fedlora.assets import ASSETS
from fedlora.cli.tables import aligned, print_table
from fedlora.config import all_keys
from fedlora.methods import methods
from tests.command import fedlora

LONG = "words " * 40 + "end"
CLI = Path(__file__).parents[2] / "fedlora" / "cli"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(out: io.StringIO, cells: tuple[str, ...], **options: bool) -> list[str]:
    print_table(Console(file=out, width=60), ("name", "meaning"), [cells], **options)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("colours", ["", "1"])
def test_in_a_pipe_a_row_is_a_line(colours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", colours)  # as continuous integration has it
    assert printed(io.StringIO(), ("a[b]", LONG)) == ["name  meaning", f"a[b]  {LONG}"]


def test_on_a_terminal_long_cells_are_wrapped_and_nothing_is_lost() -> None:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in printed(Terminal(), ("a[b]", LONG))]
    assert len(lines) > 4
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()) == f"name meaning a[b] {LONG}"
    assert len(printed(Terminal(), ("a", LONG), whole=True)) == 2


def test_a_cell_is_one_line_and_writes_no_control_characters() -> None:
    assert printed(io.StringIO(), ("a\nb", "x\x1b[2Jy"))[1] == "a b   x\\x1b[2Jy"


def test_columns_are_aligned_by_what_is_seen_and_rows_may_be_short() -> None:
    assert aligned([("a", "n"), ("\u4e2d\u6587", "10"), ("b",)], [False, True]) == ["a      n", "\u4e2d\u6587  10", "b"]
    assert cell_len("\u4e2d\u6587") == 4


@pytest.mark.parametrize("width", ["40", "80"])
def test_commands_cut_nothing_in_a_pipe(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    told = fedlora("assets").out.splitlines()
    for name, asset in ASSETS.items():
        (line,) = (line for line in told if line.startswith(f"asset:{name} "))
        assert line.endswith(asset.description)
    (key,) = (key for key in all_keys({}) if key.name == "data.choices")
    assert f"  {key.description}" in fedlora("config", key.name).out.splitlines()
    told = fedlora("methods").out.splitlines()
    for name, method in methods().items():
        assert any(line.split() == f"{name} {method.title} {method.paper}".split() for line in told)


def test_all_tables_are_printed_by_one_function() -> None:
    own = {path.name for path in CLI.glob("*.py") if "rich.table" in path.read_text(encoding="utf-8")}
    assert own == {"tables.py", "phases.py"}, "phases.py has a picture that moves; others use print_table"
