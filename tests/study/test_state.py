"""The study's folder where something is in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import InputError
from fedlora.study.config import load_study
from fedlora.study.plan import make_plan
from fedlora.study.state import StudyFolder, is_unchanged, read_state
from tests.study.studies import planned


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b""])
def test_a_damaged_state_is_made_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_bytes(content)
    assert read_state(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "study.toml").mkdir()  # to root every folder is writable
    folder = StudyFolder(tmp_path)
    try:
        with pytest.raises(InputError, match=r"^--output = .*cannot be written .*; make it writable"):
            folder.begin(load_study(planned()), [])
    finally:
        folder.close()


@pytest.mark.parametrize("tuning", [None, {"values": [0.1, 0.2]}])
def test_a_run_of_another_config_is_not_done(tuning: dict[str, Any] | None, tmp_path: Path) -> None:
    sections = {"axes": {"method.rank": [3]}} | ({"tuning": tuning} if tuning else {})
    plan = make_plan(load_study(planned(**sections)))
    changed = make_plan(load_study(planned(**sections), {"run.rounds": "9"}))
    (run,), (other,) = plan.runs, changed.runs
    found = plan.chosen(0, 0.2) if tuning else run
    (tmp_path / run.folder).mkdir(parents=True)
    (tmp_path / run.folder / "config.toml").write_text(found.config.to_toml())
    assert is_unchanged(plan, run, {"values": found.values}, tmp_path)
    assert not is_unchanged(changed, other, {"values": found.values}, tmp_path)
    assert is_unchanged(plan, run, {"values": run.values}, tmp_path) == (tuning is None)
    assert not is_unchanged(plan, run, {"values": found.values}, tmp_path / "nowhere")
