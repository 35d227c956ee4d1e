"""Workers start before the driver prepares the data, and end with the run, however that ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora import simulate, simulator
from fedlora.errors import InputError


class Opened:
    """Takes the place of a grid."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def __enter__(self) -> Opened:
        self.said.append("opened")
        return self

    def __exit__(self, *_: object) -> None:
        self.said.append("closed")


def test_workers_start_first_and_an_error_of_the_data_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def prepare(*_: Any) -> None:
        said.append("prepared")
        raise InputError("data.name", "x", "is not there")

    monkeypatch.setattr(simulator, "_open_grid", lambda *_: Opened(said))
    monkeypatch.setattr(simulator, "_prepare", prepare)
    content = {
        "model": {"name": "asset:minilm-l6"},
        "data": {"name": "asset:rotten-tomatoes", "partition": {"clients": 2}},
        "method": {"name": "fedit"},
    }
    with pytest.raises(InputError, match=r"data\.name"):
        simulate(content, output=tmp_path / "run")
    assert said == ["opened", "prepared", "closed"]
