"""A comparison and its report, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import fedlora
from tests.reporting.folders import make_study


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of runs, and of the report on them."""
    runs = make_study(tmp_path_factory.mktemp("report") / "runs")
    output = runs.parent / "output"
    done = fedlora("report", runs, "--output", output)
    assert (done.code, done.err) == (0, "")
    return runs, output


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without the static figures, which take seconds to draw."""
    monkeypatch.setattr("fedlora.reporting.report.draw_all", lambda charts: {"one.png": b"drawn"})
