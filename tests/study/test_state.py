"""The study's folder where something is in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.errors import InputError
from fedlora.study.config import load_study
from fedlora.study.state import StudyFolder, read_state
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
