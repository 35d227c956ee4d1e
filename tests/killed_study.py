"""Run a study (arguments: file, folder) and die by SIGKILL in its fourth run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fedlora.study.config import load_study
from fedlora.study.plan import PlannedRun, make_plan
from fedlora.study.runner import StudyProgress, run_study

folder = Path(sys.argv[2])
begun: set[str] = set()
ended: set[str] = set()


def started(run: PlannedRun) -> None:
    """Die at the fourth start, once every run that is under way can be resumed."""
    begun.add(run.folder)
    if len(begun) < 4:
        return
    # A run without a round behind it may be killed while it makes its folder, and then begins anew.
    rounds = [folder / name / "rounds.jsonl" for name in begun - ended]
    while not all(path.exists() and path.read_text() for path in rounds):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def end(run: PlannedRun, summary: dict[str, Any] | None, error: str | None) -> None:
    """Note a run that is done."""
    ended.add(run.folder)


if __name__ == "__main__":
    run_study(make_plan(load_study(sys.argv[1])), folder, StudyProgress(on_start=started, on_end=end))
