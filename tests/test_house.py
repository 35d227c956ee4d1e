"""The house's shape: functions that fit on a screen, and a contract of imports that forgets no module."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 80
"""Lines of a function, with its docstring."""
LATE = {"fedlora.config.* -> fedlora.methods", "fedlora.methods -> fedlora.adapters"}
"""Imports inside of functions: the config asks for its method, which is made of the config's sections."""


def sources() -> Iterator[Path]:
    """Production code; fedlora/ has links to the other three."""
    for top in ("fedlora", "strategies", "clients", "experiments"):
        yield from (path for path in sorted((ROOT / top).rglob("*.py")) if path.resolve() == path)


def test_no_function_is_longer_than_a_screen() -> None:
    found = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                found[str(path.relative_to(ROOT)), node.name, node.lineno] = node.end_lineno - node.lineno + 1
    assert len(found) > 500
    assert {place: lines for place, lines in found.items() if lines > LONGEST} == {}


def test_every_module_has_its_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = settings["contracts"]
    assert (contract["type"], contract["exhaustive"], contract["containers"]) == ("layers", True, ["fedlora"])
    assert "exhaustive_ignores" not in contract
    assert set(contract["ignore_imports"]) == LATE
    names = [name.strip(" ()") for layer in contract["layers"] for name in layer.replace(":", "|").split("|")]
    assert len(names) == len(set(names))
    packages = {path.parent.name for path in (ROOT / "fedlora").glob("*/*.py")}
    modules = {path.stem for path in (ROOT / "fedlora").glob("*.py")} - {"__init__"}
    assert packages | modules <= set(names)
    # The order that matters most: a method's two halves above the library, and beside each other.
    assert "strategies | clients" in contract["layers"]
    above = contract["layers"][: contract["layers"].index("strategies | clients")]
    assert set(above) <= {"experiments", "cli", "study", "audit", "simulator", "notebook", "reporting", "deployment"}


def test_files_of_tests_have_names_of_their_own() -> None:
    # pytest imports a test by its file's name. Of two files of one name it collects the first, and drops the other.
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert names.total() > 200
    assert not [name for name, count in names.items() if count > 1]


def test_what_is_imported_late_is_imported_late() -> None:
    late = {path: "fedlora.methods" for path in (ROOT / "fedlora" / "config").glob("*.py")}
    late[ROOT / "fedlora" / "methods.py"] = "fedlora.adapters"
    found = 0
    for path, module in late.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += sum(isinstance(node, ast.ImportFrom) and node.module == module for node in ast.walk(tree))
        assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == module]
    assert found >= len(LATE)
