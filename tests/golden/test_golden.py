"""The comparison itself: that it can fail, and that the commit to compare with is one of this history."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.golden import __main__ as golden

GIT = pytest.mark.skipif(not (golden.ROOT / ".git").exists(), reason="only a git checkout has a history")


def half(**digests: str) -> dict[str, Any]:
    return {"case": "x", "digests": digests, "seconds": 1.0}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, "equal"),
        ({"a": "1"}, {"a": "2"}, "DIFFERENT"),
        ({"a": "1", "b": "2"}, {"a": "1"}, "DIFFERENT"),
        ({"a": "1"}, {"a": "1", "b": "2"}, "DIFFERENT"),
        ({"error": "x"}, {"error": "x"}, "FAILED"),
        ({}, {}, "FAILED"),
    ],
)
def test_a_case_is_equal_only_if_every_digest_is(
    before: dict[str, str], after: dict[str, str], verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert golden._same(half(**before), half(**after)) == (verdict == "equal")
    assert f"x: {verdict}" in capsys.readouterr().out


def test_cases_cover_every_shipped_config_and_way() -> None:
    of = {name: case for name, case in golden.CASES.items() if name not in golden.SLOW}
    assert {case.config for case in of.values()} == {"quickstart", "flexmore", "smollm2"}
    assert any(case.resumed for case in of.values())
    assert any(case.nodes for case in of.values())
    assert all(case.overrides["run.rounds"] > 2 for case in of.values() if case.resumed and case.config == "quickstart")


def test_the_digests_show_one_changed_bit(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    found = []
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-23)):
        save_file({"x": torch.tensor([value, 2.0])}, tmp_path / name)
        found.append(golden._arrays(tmp_path / name))
    assert found[0] == found[1] != found[2]


@GIT
def test_the_reference_is_named_in_full() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}\n", golden.REFERENCE.read_text(encoding="utf-8"))


@GIT
def test_a_commit_that_the_clone_lacks_ends_in_one_line() -> None:
    command = [sys.executable, "-m", "tests.golden", "--against", "0" * 40]
    done = subprocess.run(command, cwd=golden.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"{'0' * 40}: this clone does not have that commit; fetch the whole history: git fetch --unshallow\n"
    )
