"""The benchmark of language models at its tiny shape: what is measured, at which sizes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora.experiments.benchmarks import llm
from tests.bare_runs import bare_runs


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure in this process, into a folder of the test's own."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llm, "_child", llm.measure)


def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, case: dict[str, Any] | None = None
) -> dict[str, Any]:
    output, config = tmp_path / "llm.json", tmp_path / "llm.toml"
    settings = tomllib.loads(Path(llm.__file__).with_suffix(".toml").read_text())
    settings |= {"clients": 2, "batches": 2, "steps": 1, "rounds": 2, "peer_steps": 1}
    settings["cases"] = [settings["cases"][-1] | (case or {})]
    config.write_text(tomli_w.dumps(settings))
    given = ["--config", str(config), "--cases", "tiny", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["llm", *given, *arguments])
    with bare_runs():
        llm.main()
    found: dict[str, Any] = json.loads(output.read_text())["cases"]["tiny"]
    return found


def test_physical_batches_are_measured_beside_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(monkeypatch, tmp_path, "--physical-batches", "2")
    assert {run: row["physical_batch"] for run, row in found.items()} == {
        "fedlora private": 4,  # the whole batch, on a CPU
        "fedlora private, physical batch 2": 2,
    }
    assert all(row["median"] > 0 and row["cohort"] == 1 and not row["checkpointing"] for row in found.values())
    # Both drew the same batches of a quarter to all of a client's examples: two clients, one step, one round.
    (drawn,) = {tuple(row["examples"]) for row in found.values()}
    assert len(drawn) == 1
    assert 1 <= drawn[0] <= 16
    assert "cohort 1, physical batch 2" in capsys.readouterr().out


def test_a_length_is_doubled_until_it_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lengths = []

    def child(run: str, folder: Path) -> dict[str, Any]:
        known = json.loads((folder / llm.CASE).read_text())
        lengths.append(known["case"]["tokens"])
        text = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["text"]
        assert len(text.split()) == lengths[-1] - 1  # and the token that ends it
        return {"error": "out of memory"} if lengths[-1] > 64 else llm.measure(run, folder)

    monkeypatch.setattr(llm, "_child", child)
    # One example a client, as at the lengths that matter.
    found = measured(monkeypatch, tmp_path, "--tokens", "32", "--batch", "1", case={"longest": 1024})
    assert lengths == [32, 64, 128]
    fit = {run: row for run, row in found.items() if "median" in row}
    assert list(fit) == [f"fedlora private, {n} tokens" for n in (32, 64)]
    assert all(row["checkpointing"] and row["examples"] == [1] for row in fit.values())


def test_a_run_of_a_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measured(monkeypatch, tmp_path, "--runs", "peft", "--tokens", "8", "--batch", "2")
    assert found["peft"]["median"] > 0
