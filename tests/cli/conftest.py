"""Commands are tested as on a terminal that can draw, whatever the tests run on."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def a_terminal_that_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
