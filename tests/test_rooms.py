"""A method is one room: outside its own files nothing has its name, the words of its mathematics, or a flag of its own.

``python -m tests.test_rooms`` prints what is left.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.methods import methods
from fedlora.strategies.base import FederatedStrategy

ROOT = Path(__file__).resolve().parents[1]
METHODS = methods()

WORDS = ("expert", "router", "mixture")
"""Of one method's mathematics."""
ROOMS = ("strategies/flexmore", "clients/flexmore", "fedlora/experts/")
"""Where these words are at home: beginnings of paths."""
NOT_NAMES = ("peft",)
"""Methods that are called after a library."""

NAMES_LEFT: dict[str, int] = {
    "fedlora/adapters/peft_format.py": 1,
    "fedlora/adapters/sb.py": 1,
    "fedlora/config.py": 7,
    "fedlora/continuing.py": 1,
    "fedlora/experts/expert.py": 1,
    "fedlora/experts/mixture.py": 1,
    "fedlora/reporting/style.py": 4,
    "fedlora/results/load.py": 2,
    "fedlora/simulator.py": 1,
    "clients/participant.py": 1,
}
"""File: methods' names in it today. It may only shrink."""

WORDS_LEFT: dict[str, int] = {
    "fedlora/__init__.py": 1,
    "fedlora/adapters/__init__.py": 5,
    "fedlora/adapters/expert.py": 50,
    "fedlora/adapters/merged.py": 49,
    "fedlora/adapters/reach.py": 2,
    "fedlora/adapters/targets.py": 3,
    "fedlora/cli/study.py": 2,
    "fedlora/config.py": 29,
    "fedlora/continuing.py": 6,
    "fedlora/models.py": 1,
    "fedlora/privacy/calibration.py": 1,
    "fedlora/results/load.py": 40,
    "fedlora/results/outputs.py": 2,
    "fedlora/study/forecast.py": 7,
    "fedlora/training/expert_start.py": 24,
    "fedlora/training/router.py": 26,
    "fedlora/training/soundness.py": 2,
    "strategies/base.py": 1,
    "clients/client_app.py": 8,
    "clients/resources.py": 2,
}
"""File: words in it today. It may only shrink."""

FLAGS_LEFT: dict[str, str] = {
    "covers_init": "fed-sb",
    "holds": "flexmore",
}
"""Attributes of the base class that one method alone sets today. It may only shrink."""


def pattern(spelling: str) -> re.Pattern[str]:
    """Return what finds a name or word in text and in identifiers, however it is joined: fed-sb, FED_SB, FedSBLayer.

    Letters before and after it belong to another word, unless a capital begins it or what follows.
    """
    joined = r"[-_ ]?".join(rf"(?:{part}|{part.upper()}|{_humps(part)})" for part in spelling.split("-"))
    small = joined.replace("(?:", "(?i:")
    return re.compile(rf"(?<![A-Za-z0-9])(?i:{small})s?(?![a-z0-9])|(?<=[a-z0-9])(?=[A-Z]){joined}s?(?![a-z0-9])")


def _humps(part: str) -> str:
    return part[0].upper() + "".join(f"[{letter}{letter.upper()}]" for letter in part[1:])


def texts(*tops: str) -> Iterator[tuple[str, str]]:
    """Files below folders, as they stand: path, then the path's own words and all that is in it."""
    for top in tops:
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", ".toml", ".j2", ".js", ".css", ".html") and path.resolve() == path:
                name = str(path.relative_to(ROOT))
                yield name, f"{name}\n{path.read_text(encoding='utf-8')}"


def names_left() -> dict[str, int]:
    """Methods' names in fedlora/, and in clients/ outside of the method's own file."""
    found = {}
    for path, text in texts("fedlora", "clients"):
        own = Path(path).relative_to("clients").parts[0].removesuffix(".py") if path.startswith("clients/") else ""
        names = [name for name in METHODS if name not in NOT_NAMES and name.replace("-", "_") != own]
        found[path] = sum(len(pattern(name).findall(text)) for name in names)
    return {path: count for path, count in found.items() if count}


def words_left() -> dict[str, int]:
    """Words of one method's mathematics outside of its rooms."""
    found = {
        path: sum(len(pattern(word).findall(text)) for word in WORDS)
        for path, text in texts("fedlora", "strategies", "clients")
        if not path.startswith(ROOMS)
    }
    return {path: count for path, count in found.items() if count}


def flags_left() -> dict[str, str]:
    """Flags of the base class that one registered method alone sets, and the method."""
    members = dict(inspect.getmembers_static(FederatedStrategy))
    flags = {name for name, hint in FederatedStrategy.__annotations__.items() if "bool" in str(hint)}
    flags |= {name for name, value in members.items() if isinstance(value, bool) or _answers_yes_or_no(value)}
    setting = {flag: [name for name, method in METHODS.items() if _sets(method, flag)] for flag in sorted(flags)}
    return {flag: names[0] for flag, names in setting.items() if len(names) == 1}


def _answers_yes_or_no(member: object) -> bool:
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return "bool" in str(getattr(function, "__annotations__", {}).get("return"))


def _sets(method: type, flag: str) -> bool:
    default = inspect.getattr_static(FederatedStrategy, flag, None)
    return inspect.getattr_static(method, flag, default) is not default


@pytest.mark.parametrize(
    ("spelling", "text", "count"),
    [
        ("fed-sb", "fed-sb fed_sb Fed-SB FedSB FedSb FEDSB FedSBLayer MyFedSB fed_sb_start", 9),
        ("fed-sb", "sb, fed, sbs fedsby unfedsb", 0),
        ("fedit", "fedit FedIT FedITs Fedit.", 4),
        ("fedit", "edit credited fedited confedit", 0),
        ("flora", "fedlora", 0),
        ("flexmore", "FlexMoRE's FlexMoREStrategy flexmore_round", 3),
        ("expert", "expert Experts EXPERT expert_start ExpertModel makeExpert own_experts", 7),
        ("expert", "expertise inexpert", 0),
        ("mixture", "mixture's Mixtures_of", 2),
        ("mixture", "Mixtral admixture", 0),
    ],
)
def test_the_search_finds_every_spelling_and_no_other_word(spelling: str, text: str, count: int) -> None:
    assert len(pattern(spelling).findall(text)) == count


def test_the_search_reads_the_code() -> None:
    files = dict(texts("fedlora", "strategies", "clients"))
    assert len(files) > 100
    assert any(path.startswith("clients/") for path in files)


@pytest.mark.parametrize(("left", "allowed"), [(names_left, NAMES_LEFT), (words_left, WORDS_LEFT)])
def test_nothing_of_one_method_comes_in_elsewhere(left: object, allowed: dict[str, int]) -> None:
    assert callable(left)
    found = left()
    print(f"{left.__name__}: {sum(found.values())} in {len(found)} files")
    more = {path: count for path, count in found.items() if count > allowed.get(path, 0)}
    assert more == {}, "a method's name or word belongs in the method's own files"
    gone = [path for path in allowed if path not in found]
    assert gone == [], "these are clean now: take them out of the list"


def test_no_flag_serves_one_method_alone() -> None:
    assert flags_left().keys() <= set(FLAGS_LEFT)


if __name__ == "__main__":
    for left in (names_left, words_left, flags_left):
        print(left.__name__.upper())
        for key, value in left().items():
            print(f"    {key!r}: {value!r},".replace("'", '"'))
