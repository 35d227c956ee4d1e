"""What a benchmark learns of a run in a process of its own."""

from __future__ import annotations

from pathlib import Path

from fedlora.experiments.benchmarks.own_process import run_module


def test_the_last_line_is_the_result_and_a_failure_is_its_last_words(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"seconds": [1, 2]}')
    bad.write_text("{")
    assert run_module("json.tool", ["--compact", str(good)], 60) == {"seconds": [1, 2]}
    assert run_module("json.tool", [str(bad)], 60)["error"].startswith("Expecting property name")
    assert run_module("timeit", ["-n", "1", "import time; time.sleep(60)"], 0.5) == {"error": "more than 0.5 s"}
