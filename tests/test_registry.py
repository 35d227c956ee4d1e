"""Choices by name: fedlora's files, and entry points of other packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora import registry
from fedlora.errors import InputError
from fedlora.privacy.accountants import Accountant
from fedlora.registry import Registry
from tests.packages import lay_package

MODULE = """
from fedlora.privacy.accountants import Accountant

class Mine(Accountant):
    name = "mine"
    is_bound = False
    note = "adds up"

    def epsilon(self, delta, history):
        return float(sum(steps for _, _, steps in history))

class Unfinished(Accountant):
    name = "unfinished"
"""


def install(folder: Path, package: str, name: str, value: str) -> None:
    """Put a package with an accountant on the path."""
    lay_package(folder, package, {"fedlora.accountants": {name: value}}, MODULE)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def accountants() -> Registry:
    return Registry("fedlora.privacy.accountants:Accountant", "fedlora.accountants", "privacy.accountant")


def test_names_are_files() -> None:
    folder = Path(registry.__file__).parent / "privacy" / "accountants"
    found = accountants()
    assert found.names() == sorted(path.stem for path in folder.glob("[!_]*.py"))
    for name in found.names():
        assert issubclass(found.get(name), Accountant)
        assert found.get(name).name == name


def test_another_package_adds_one(site: Path) -> None:
    install(site, "own_accounting", "mine", "own_accounting:Mine")
    found = accountants()
    assert "mine" in found.names()
    assert found.check("mine") == "mine"
    assert found.get("mine")().epsilon(0.1, ((1.0, 0.5, 3), (2.0, 0.5, 4))) == 7


@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        ("rdp", "broken:Mine", InputError, "registered by fedlora and by broken"),
        ("mine", "broken:Absent", InputError, "does not load from broken"),
        ("mine", "no_such_module:Mine", InputError, "fix or uninstall"),
        ("mine", "broken:MODULE", InputError, "does not load"),
        ("other", "broken:Mine", TypeError, "concrete Accountant with name = 'other'"),
        ("unfinished", "broken:Unfinished", TypeError, "concrete Accountant"),
    ],
)
def test_what_is_wrong_costs_that_name_alone(
    site: Path, name: str, value: str, error: type[Exception], said: str
) -> None:
    install(site, "broken", name, value)
    found = accountants()
    with pytest.raises(error, match=said):
        found.get(name)
    assert found.get("prv").name == "prv"


def test_two_packages_with_one_name(site: Path) -> None:
    for package in ("one", "two"):
        install(site, f"{package}_accounting", "mine", f"{package}_accounting:Mine")
    with pytest.raises(InputError, match=r"one_accounting and by two_accounting|two_accounting and by one_accounting"):
        accountants().get("mine")


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"should be .*'rdp'"):
        accountants().check("rpd")
    with pytest.raises(InputError, match=r"privacy\.accountant = 'rpd': there is no such choice"):
        accountants().get("rpd")


def test_names_cost_no_import() -> None:
    absent = Registry("fedlora.privacy.accountants:NoSuchClass", "fedlora.no-such-group", "x")
    assert "rdp" in absent.names()
