"""A study draws nothing: it imports no library that draws, and runs where none is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.study.studies import tiny

ROOT = Path(__file__).parents[2]

CODE = """
import importlib, json, pkgutil, sys

sys.modules["plotly"] = None  # as if it were not installed

import fedlora.study
from fedlora.study.config import load_study
from fedlora.study.plan import make_plan

plan = make_plan(load_study(json.load(sys.stdin)))
for module in pkgutil.iter_modules(fedlora.study.__path__):
    importlib.import_module(f"fedlora.study.{module.name}")
import fedlora.cli.study

drawing = ("matplotlib", "plotly", "fedlora.reporting.report")
print(len(plan.runs), [name for name in sys.modules if name.startswith(drawing) and sys.modules[name]])
"""


def test_a_study_imports_nothing_that_draws() -> None:
    study = tiny(report={"budgets": {"bytes": [1e6]}, "targets": [0.7]})
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(study), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["4 []"], done.stdout + done.stderr
