"""A run whose tokens are in the cache imports no library that reads or divides examples: they take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.llama_runs import LlamaRuns

ROOT = Path(__file__).parents[2]

CODE = """
import json, sys, fedlora
result = fedlora.simulate(json.load(sys.stdin), output=sys.argv[1])
print(result.summary["rounds"], [name for name in sys.modules if name in ("datasets", "flwr_datasets", "plotly")])
"""


def test_tokens_in_the_cache_are_enough(tmp_path: Path) -> None:
    runs = LlamaRuns(tmp_path)
    first = runs.run(run={"rounds": 1})
    config = runs.config(run={"rounds": 1}).model_dump(exclude_none=True)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "again")],
        input=json.dumps(config), capture_output=True, text=True,
        env={**os.environ, "FEDLORA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["1 []"], done.stdout + done.stderr
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["final"] == first.summary["final"]
