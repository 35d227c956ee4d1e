"""docs/papers.md: every method and every paper that the code names is on it, with files and tests that there are."""

from __future__ import annotations

import re

import pytest

from fedlora.methods import methods
from tests.pages import ROOT

TEXT = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
NUMBER = r"\b\d{4}\.\d{5}\b|\b0909\.4061\b"


def section(name: str) -> str:
    """Return what the page says of a method."""
    (found,) = [part for part in TEXT.split("\n### ") if f'method.name = "{name}"' in part]
    return found


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_method_has_its_paper_file_and_check(name: str) -> None:
    found, method = section(name), methods()[name]
    numbers = re.findall(NUMBER, method.paper)
    assert all(number in found.partition("\n")[0] for number in numbers)
    file = method.__module__.removeprefix("fedlora.").replace(".", "/")
    assert f"`{file}.py`" in found or f"`{file}/`" in found
    assert re.search(r"`tests/[\w/]+\.py::\w+`", found)


def test_every_paper_that_the_code_names_is_there() -> None:
    sources = [path for top in ("fedlora", "strategies", "clients") for path in (ROOT / top).rglob("*.py")]
    named = {number: path for path in sources for number in re.findall(rf"(?i:arxiv) ({NUMBER})", path.read_text())}
    assert len(named) > 40
    assert not {number: path.name for number, path in named.items() if number not in TEXT}


def test_links_lead_to_the_numbers_that_they_show() -> None:
    links = re.findall(rf"\[({NUMBER})\]\(([^)\s]+)\)", TEXT)
    assert len(links) > 40
    assert all(link == f"https://arxiv.org/abs/{number}" for number, link in links)


def test_files_and_tests_are_there() -> None:
    cited = re.findall(r"`((?:tests|strategies|fedlora|clients|experiments)/[\w./]+)(?:::(\w+))?`", TEXT)
    assert len(cited) > 60
    for file, test in cited:
        assert (ROOT / file).exists(), file
        if test:
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
