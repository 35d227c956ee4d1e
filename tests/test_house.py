"""The house's shape: functions that fit on a screen, and a contract of imports that forgets no module."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 80
"""Lines of a function, with its docstring."""
TOO_LONG = {
    # file, function: lines today. It may only shrink.
    ("fedlora/models.py", "load_base"): 95,
    ("fedlora/simulator.py", "simulate"): 116,
    ("fedlora/training/cohort.py", "train_cohort"): 108,
    ("strategies/federation.py", "run_federation"): 206,
}


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
                found[str(path.relative_to(ROOT)), node.name] = node.end_lineno - node.lineno + 1
    assert len(found) > 500
    assert {name: lines for name, lines in found.items() if lines > TOO_LONG.get(name, LONGEST)} == {}
    done = [name for name in TOO_LONG if found.get(name, 0) <= LONGEST]
    assert done == [], "these fit now: take them out of TOO_LONG"


def test_every_module_has_its_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = settings["contracts"]
    assert (contract["type"], contract["exhaustive"], contract["containers"]) == ("layers", True, ["fedlora"])
    assert "exhaustive_ignores" not in contract
    # The config looks its method up, which is made of the config's sections; a method puts in what is trained.
    late = {"fedlora.config.* -> fedlora.methods", "fedlora.methods -> fedlora.adapters"}
    assert set(contract["ignore_imports"]) == late
    names = [name.strip(" ()") for layer in contract["layers"] for name in layer.replace(":", "|").split("|")]
    assert len(names) == len(set(names))
    packages = {path.parent.name for path in (ROOT / "fedlora").glob("*/*.py")}
    modules = {path.stem for path in (ROOT / "fedlora").glob("*.py")} - {"__init__"}
    assert packages | modules <= set(names)
    # The order that matters most: a method's two halves above the library, and beside each other.
    assert "strategies | clients" in contract["layers"]
    above = contract["layers"][: contract["layers"].index("strategies | clients")]
    assert set(above) <= {"experiments", "cli", "study", "simulator", "reporting", "deployment"}
