"""What a run chose to put through the model at once is kept: also by a resumed run, on another card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import simulate
from fedlora.arrays import Arrays
from fedlora.clients.resources import forget_model
from fedlora.config import Config, load_config
from fedlora.results.folder import RunResult
from fedlora.strategies.callbacks import Progress
from tests.fake_gpus import ROW, FakeGPUs
from tests.llama_runs import LlamaRuns, adapter

MUCH, FOR_TWO = 100 * ROW, 2 * ROW
"""Free memory: of many rows, and of two."""


@contextmanager
def on_cards(free: int, busy: float) -> Iterator[FakeGPUs]:
    """Run a process on cards that so many examples of 5 tokens keep busy."""
    forget_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.training.passes.mean_product", lambda _: 1.0)
        patch.setattr("fedlora.training.passes.BUSY", busy * 5)
        patch.setattr("fedlora.training.passes.COHORT", 4)
        patch.setattr("fedlora.training.passes.SMALLEST", 4)
        patch.setattr("fedlora.simulator._resolve_cohorts", lambda config: config)
        yield FakeGPUs(patch, free)
    forget_model()


def run(
    runs: LlamaRuns,
    folder: Path,
    notes: list[str] | None = None,
    stop: int = 0,
    resume: bool = False,
    physical: int | None = None,
) -> RunResult:
    """Run or resume in a folder; with ``stop``, end after that round."""

    def on_round(line: dict[str, Any]) -> None:
        if line["round"] == stop:
            raise KeyboardInterrupt

    progress = Progress(on_round=on_round, on_note=([] if notes is None else notes).append)
    client = {"batch_size": 8, "local_steps": 2, "physical_batch_size": physical}
    content = runs.config(client=client).model_dump(exclude_none=True)
    with runs._cache():
        return simulate(content, output=folder, progress=progress, resume=resume)


def stopped(runs: LlamaRuns, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(runs, folder, stop=1)


def kept(folder: Path) -> tuple[Any, ...]:
    config: Config = load_config(folder / "config.toml")
    client = config.client
    return config.simulation.cohort_size, client.physical_batch_size, client.gradient_checkpointing


def same(some: Arrays, others: Arrays) -> bool:
    return all(torch.equal(array, others[name]) for name, array in some.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("free", "busy", "choice"),
    [
        (MUCH, 4, (1, 4, "auto")),  # by time
        (FOR_TWO, 4, (1, 2, "auto")),  # by memory
        (FOR_TWO, 100, (1, None, True)),  # a part of a batch would be too small
        (MUCH, 20, (4, None, "auto")),  # all clients together
    ],
)
def test_a_resumed_run_takes_the_choice_and_gives_the_same_bits(
    free: int, busy: float, choice: tuple[Any, ...], runs: LlamaRuns, tmp_path: Path
) -> None:
    notes: list[str] = []
    with on_cards(free, busy):
        whole = run(runs, tmp_path / "whole", notes)
        stopped(runs, tmp_path / "run")
    assert kept(whole.folder) == kept(tmp_path / "run") == choice
    assert [note for note in notes if note.startswith(f"physical batch {choice[1] or 8} of 8, cohort {choice[0]}, ")]
    with on_cards(MUCH * 10, busy) as cards:
        resumed = run(runs, tmp_path / "run", resume=True)
    assert kept(resumed.folder) == choice
    assert {on for _, on in cards.passes} == {choice[2] is True}
    assert same(adapter(resumed), adapter(whole))


def test_what_does_not_fit_on_the_other_card_is_lowered_and_said(
    runs: LlamaRuns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with on_cards(MUCH, 4):
        stopped(runs, tmp_path / "run")
    with on_cards(FOR_TWO, 4) as cards:
        resumed = run(runs, tmp_path / "run", resume=True)
    assert kept(resumed.folder) == (1, 2, "auto")
    assert max(rows for rows, _ in cards.passes) == 2
    assert caplog.text.count("from now on client.physical_batch_size is 2") == 1


def test_what_the_config_says_is_not_chosen(runs: LlamaRuns, tmp_path: Path) -> None:
    with on_cards(MUCH, 4) as cards:
        result = run(runs, tmp_path / "run", physical=3)
    assert kept(result.folder) == (4, 3, "auto")  # several clients: three examples of one are not enough
    assert max(rows for rows, _ in cards.passes) == 4 * 3


def test_on_a_cpu_nothing_is_chosen(runs: LlamaRuns, tmp_path: Path) -> None:
    notes: list[str] = []
    result = run(runs, tmp_path / "run", notes)
    assert kept(result.folder) == (1, None, "auto")
    assert not any("physical batch" in note for note in notes)
