"""A method is one room: outside its own files nothing has its name, the words of its mathematics, or a flag of its own.

``python -m tests.test_rooms`` prints what is left.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedlora.methods import methods
from fedlora.strategies.base import FederatedStrategy

ROOT = Path(__file__).resolve().parents[1]
METHODS = methods()

WORDS = {"flexmore": ("expert", "router", "mixture")}
"""Of one method's mathematics, by the method."""
TERMS = re.compile(r"mixtures? ?of ?gaussians", re.IGNORECASE)
"""Terms of other fields that have one of these words: what a privacy accountant calls a mechanism."""
SHARED = {"flexmore": ("fedlora/experts/",)}
"""What both halves of a method share lies here: beginnings of paths. What it saves is called by the method's name."""
NOT_NAMES = ("peft",)
"""Methods that are called after a library."""


def pattern(spelling: str) -> re.Pattern[str]:
    """Return what finds a name or word in text and in identifiers, however it is joined: fed-sb, FED_SB, FedSBLayer.

    Letters before and after it belong to another word, unless a capital begins it or what follows.
    """
    joined = r"[-_ ]?".join(rf"(?:{part}|{part.upper()}|{_humps(part)})" for part in spelling.split("-"))
    small = joined.replace("(?:", "(?i:")
    return re.compile(rf"(?<![A-Za-z0-9])(?i:{small})s?(?![a-z0-9])|(?<=[a-z0-9])(?=[A-Z]){joined}s?(?![a-z0-9])")


def _humps(part: str) -> str:
    return part[0].upper() + "".join(f"[{letter}{letter.upper()}]" for letter in part[1:])


def texts() -> Iterator[tuple[str, str]]:
    """The library and both halves of all methods: each file's path, then the path's own words and all that is in it."""
    for top in ("fedlora", "strategies", "clients"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", ".toml", ".j2", ".js", ".css", ".html") and path.resolve() == path:
                name = str(path.relative_to(ROOT))
                yield name, TERMS.sub("", f"{name}\n{path.read_text(encoding='utf-8')}")


def is_own(path: str, method: str) -> bool:
    """Whether a file is the method's: its file or folder in strategies/ or clients/, or what these two share."""
    top, _, rest = path.partition("/")
    module = rest.partition("/")[0].removesuffix(".py")
    halves = top in ("strategies", "clients") and module == method.replace("-", "_")
    return halves or path.startswith(SHARED.get(method, ()))


def names_left() -> dict[str, int]:
    """Methods' names outside of the method's own files; one method's strategy may speak of another."""
    found = count_elsewhere({name: (name,) for name in METHODS if name not in NOT_NAMES})
    compared = {path for path in found if path.startswith("strategies/") for name in METHODS if is_own(path, name)}
    return {path: count for path, count in found.items() if path not in compared}


def words_left() -> dict[str, int]:
    """Words of one method's mathematics outside of its own files."""
    return count_elsewhere(WORDS)


def count_elsewhere(words: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Count the words of each method in the files that are not its own."""
    found: dict[str, int] = {}
    for path, text in texts():
        for method, spellings in words.items():
            if not is_own(path, method):
                found[path] = found.get(path, 0) + sum(len(pattern(word).findall(text)) for word in spellings)
    return {path: count for path, count in found.items() if count}


def flags_left() -> dict[str, str]:
    """Flags of the base class that one registered method alone sets, and the method."""
    members = dict(inspect.getmembers_static(FederatedStrategy))
    hints = {
        name: hint for base in FederatedStrategy.__mro__ for name, hint in vars(base).get("__annotations__", {}).items()
    }
    flags = {name for name, hint in hints.items() if str(hint) in ("bool", "ClassVar[bool]")}
    flags |= {name for name, value in members.items() if isinstance(value, bool) or _answers_yes_or_no(value)}
    setting = {flag: [name for name, method in METHODS.items() if _sets(method, flag)] for flag in sorted(flags)}
    return {flag: names[0] for flag, names in setting.items() if len(names) == 1}


def _answers_yes_or_no(member: object) -> bool:
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return str(getattr(function, "__annotations__", {}).get("return")) == "bool"


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
    files = dict(texts())
    assert len(files) > 100
    assert any(path.startswith("clients/") for path in files)


@pytest.mark.parametrize(
    ("path", "method", "own"),
    [
        ("strategies/flexmore/__init__.py", "flexmore", True),
        ("clients/flexmore.py", "flexmore", True),
        ("clients/flexmore_more.py", "flexmore", False),
        ("fedlora/experts/router.py", "flexmore", True),
        ("fedlora/experts/router.py", "fed-sb", False),
        ("strategies/fed_sb.py", "fed-sb", True),
        ("fedlora/fed_sb.py", "fed-sb", False),
    ],
)
def test_a_methods_files_are_its_halves_and_what_they_share(path: str, method: str, own: bool) -> None:
    assert is_own(path, method) == own


@pytest.mark.parametrize("left", [names_left, words_left])
def test_nothing_of_one_method_comes_in_elsewhere(left: Callable[[], dict[str, int]]) -> None:
    assert left() == {}, "a method's name or word belongs in the method's own files"


def test_no_flag_serves_one_method_alone() -> None:
    assert flags_left() == {}


@pytest.mark.parametrize("flag", ["dp", "covers_init", "private", "enough_replies"])
def test_the_search_finds_every_kind_of_flag(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class attributes, properties and methods, as soon as one method alone has its own."""
    monkeypatch.setattr(METHODS["fedit"], flag, object(), raising=False)
    assert flags_left() == {flag: "fedit"}


if __name__ == "__main__":
    for left in (names_left, words_left, flags_left):
        print(left.__name__.upper())
        for key, value in left().items():
            print(f"    {key!r}: {value!r},".replace("'", '"'))
