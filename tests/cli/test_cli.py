"""The command line: what it prints, where, and with which exit code it ends."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.assets import ASSETS
from fedlora.cli import parse_overrides
from fedlora.cli.display import COLUMNS, RunDisplay
from fedlora.cli.phases import PhaseDisplay
from fedlora.errors import InputError, RunError
from fedlora.methods import methods
from fedlora.results import RunResult
from fedlora.summaries import result_rows
from fedlora.tasks import get_task
from tests.command import fedlora

METHODS = methods()

SUMMARY: dict[str, Any] = {
    "final": {"accuracy": 0.7512, "majority": 0.571, "loss": 0.5},
    "epsilon": {"max": 7.9954, "delta": 1e-5, "unit": "one example of one client", "covers_init": True},
    "communication": {"initial_bytes": 1_234_567, "downlink_bytes": 2_000, "uplink_bytes": 999},
    "trainable_parameters": 12_345,
    "seconds": {"total": 61.26},
}
LINE: dict[str, Any] = {
    "round": 1,
    "metrics": {"loss": 0.65432, "accuracy": 0.7},
    "train_loss": 0.7,
    "epsilon": 3.25,
    "failed": [],
    "seconds": {"train": 1.0, "communicate": 0.5, "aggregate": 0.25, "evaluate": 0.25},
    "communication": {"initial_bytes": 1000, "downlink_bytes": 2000, "uplink_bytes": 3000},
}


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace ``simulate``; the calls are recorded."""
    calls: list[dict[str, Any]] = []

    def simulate(config: str, overrides: Any, **options: Any) -> RunResult:
        calls.append({"config": config, "overrides": overrides, **options})
        options["progress"].on_start(1, 0, 2)
        options["progress"].on_client(0)
        options["progress"].on_round(LINE)
        return RunResult(Path("runs/x"), SUMMARY)

    monkeypatch.setattr("fedlora.simulator.simulate", simulate)
    return calls


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nname = "m"\n[data]\nname = "d"\n[data.partition]\nclients = 2\n[method]\nname = "fedit"\n'
    )
    return path


def test_a_run_is_simulated_with_what_was_given(config: Path, simulated: list[dict[str, Any]], tmp_path: Path) -> None:
    done = fedlora(
        "run", config, "--set", "run.seed=3", "--set", "data.text=a=b", "--output", tmp_path / "out", "--resume"
    )
    assert (done.code, done.err) == (0, "")
    (call,) = simulated
    assert call["config"] == str(config)
    assert call["overrides"] == {"run.seed": "3", "data.text": "a=b"}
    assert (call["output"], call["resume"]) == (tmp_path / "out", True)


def test_a_run_prints_its_rounds_and_its_result(config: Path, simulated: list[dict[str, Any]]) -> None:
    header, first, *rest = fedlora("run", config).out.splitlines()
    assert header.split() == " ".join(name for name, _ in COLUMNS).split()
    assert first.split() == ["1", "0.7000", "0.6543", "70.0%", "3.250", "6.0", "kB", "0", "2.0"]
    result = dict(line.split(maxsplit=1) for line in rest)
    assert result["accuracy"] == "75.1% (majority class 57.1%)"
    assert result["epsilon"] == "7.995 at delta 1e-05, one example of one client"
    assert result["bytes"] == "999 B up, 2.0 kB down, 1.2 MB once"
    assert result["trained"] == "12,345 parameters"
    assert result["folder"] == "runs/x"


def test_a_score_is_told_with_the_number_of_its_examples() -> None:
    facts = {**SUMMARY, "test_examples": 1280}
    rows = dict(result_rows(facts, get_task("sequence-classification"), Path("x")))
    assert rows["tested on"] == "1,280 examples, so one is 0.078 points of accuracy"
    facts["final"] = {"perplexity": 12.3}  # which is no share of them
    assert dict(result_rows(facts, get_task("causal-lm"), Path("x")))["tested on"] == "1,280 examples"
    assert "tested on" not in dict(result_rows(SUMMARY, get_task("sequence-classification"), Path("x")))


def test_without_a_terminal_there_is_no_bar(config: Path, simulated: list[dict[str, Any]]) -> None:
    out = fedlora("run", config).out
    assert "\x1b" not in out
    assert "\r" not in out
    assert len(out.splitlines()) == 8


def display(task: str = "sequence-classification", **options: Any) -> tuple[RunDisplay, io.StringIO]:
    out = io.StringIO()
    return RunDisplay(PhaseDisplay(Console(file=out, width=60, **options)), get_task(task)), out


def test_below_the_phases_is_the_last_round() -> None:
    shown, _ = display(force_terminal=True)
    shown.progress.on_round(LINE)
    assert shown.phases.note == "loss 0.7000  score 70.0%  epsilon 3.250  sent 6.0 kB"


def test_rounds_without_evaluation_or_privacy_have_dashes() -> None:
    shown, out = display("causal-lm")
    shown.progress.on_start(2, 0, 3)
    shown.progress.on_round({**LINE, "metrics": {}, "train_loss": None, "epsilon": None})
    shown.progress.on_round({**LINE, "round": 2, "metrics": {"loss": 2.0, "perplexity": 7.389}})
    _, first, second = out.getvalue().splitlines()
    assert first.split() == ["1", "-", "-", "-", "-", "6.0", "kB", "0", "2.0"]
    assert second.split()[3] == "7.39"


def test_a_failed_client_is_shown_with_its_reason() -> None:
    shown, out = display()
    error = "Traceback (most recent call last):\n  File x\nValueError: [red]out of luck"
    shown.progress.on_start(1, 0, 3)
    shown.progress.on_round({**LINE, "failed": [{"client": 7, "code": 101, "error": error}]})
    assert out.getvalue().splitlines()[1].split()[-2] == "1"
    assert out.getvalue().splitlines()[2] == "client 7 failed: ValueError: [red]out of luck"


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    shown, out = display("causal-lm")
    shown.summary(RunResult(tmp_path, {**SUMMARY, "epsilon": None, "final": {"perplexity": 12.345}}))
    lines = out.getvalue().splitlines()
    assert "finished already" in lines[0]
    assert lines[1].split() == ["perplexity", "12.35"] or lines[1].split() == ["perplexity", "12.34"]
    assert not any(line.startswith(("epsilon", "accuracy")) for line in lines)


def test_a_long_path_is_printed_as_it_is() -> None:
    shown, out = display()
    path = Path("/" + "/".join(["a[b]long folder"] * 12))
    shown.progress.on_start(1, 0, 1)
    shown.summary(RunResult(path, SUMMARY))
    assert out.getvalue().splitlines()[-1] == f"folder      {path}"


def test_a_start_that_no_budget_covers_is_told() -> None:
    shown, out = display()
    epsilon = {**SUMMARY["epsilon"], "covers_init": False}
    shown.summary(RunResult(Path("x"), {**SUMMARY, "epsilon": epsilon}))
    assert "the start is not covered" in out.getvalue()


def test_what_went_wrong_in_a_run_is_told_without_a_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RunError("every client of the round failed")

    monkeypatch.setattr("fedlora.simulator.simulate", fail)
    done = fedlora("run", config)
    assert (done.code, done.out, done.err) == (1, "", "fedlora: every client of the round failed\n")


def test_control_c_says_how_to_go_on(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora.simulator.simulate", stop)
    done = fedlora("run", config)
    # Nothing had begun.
    folder = Path("runs") / "run"
    assert (done.code, done.err) == (1, f"fedlora: stopped; continue with: fedlora run {config} --output {folder}\n")


def test_a_bug_is_not_hidden(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fedlora.simulator.simulate", fail)
    with pytest.raises(ZeroDivisionError):
        fedlora("run", config)


def test_methods_are_listed() -> None:
    done = fedlora("methods")
    assert done.code == 0
    assert all(name in done.out for name in METHODS)


def test_assets_are_listed() -> None:
    done = fedlora("assets")
    assert done.code == 0
    assert all(f"asset:{name}" in done.out for name in ASSETS)
    # With the size of its download.
    assert re.search(r"asset:mpnet-base +model +405 MB", done.out)


def test_a_fetched_asset_is_answered_with_its_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    done = fedlora("assets", "minilm-l6", "asset:rotten-tomatoes")
    folders = [Path(line) for line in done.out.splitlines()]
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["minilm-l6", "rotten-tomatoes"]
    assert all(folder.is_dir() for folder in folders)


def test_help_names_every_command() -> None:
    done = fedlora("--help")
    assert done.code == 0
    assert all(command in done.out for command in ("run", "export", "methods", "assets"))


def test_pairs_are_split_at_the_first_equals_sign() -> None:
    assert parse_overrides(["a.b = 1 ", "a.c=x=y", "a.d="]) == {"a.b": "1", "a.c": "x=y", "a.d": ""}
    with pytest.raises(InputError, match=r"section\.key=value"):
        parse_overrides(["a.b"])


@pytest.mark.parametrize("key", ["", "data.name", "data"])
def test_a_config_is_checked_and_its_keys_described_without_torch(config: Path, key: str) -> None:
    # Seconds pass before torch is there; a mistyped key should not wait for it.
    script = (
        "import sys\nfrom fedlora.cli import main\ntry:\n    main()\nexcept SystemExit as e:\n"
        "    print(e.code, sorted({'torch', 'flwr', 'ray', 'transformers'} & sys.modules.keys()))"
    )
    arguments, code = (["config", key], 0) if key else (["run", str(config), "--set", "run.sed=1"], 2)
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == f"{code} []"
