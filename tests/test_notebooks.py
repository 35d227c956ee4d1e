"""The notebooks of the documentation run from the first cell to the last, and runs behave in a notebook's kernel."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from fedlora import RunResult, simulate
from fedlora.config import Config
from fedlora.notebook import rounds_bar, shown
from fedlora.strategies.callbacks import Progress
from tests.llama_runs import LlamaRuns

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def config(runs: LlamaRuns) -> Config:
    return runs.config(run={"rounds": 2, "seed": 3, "name": "small"})


def test_there_are_notebooks_and_they_hold_no_outputs() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"first_run", "privacy_accuracy"}
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs"), path
            assert cell.get("execution_count") is None, path


@pytest.fixture(scope="module")
def executed(cached: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every notebook after its cells were run, each in a folder of its own."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        for path in NOTEBOOKS:
            notebook = nbformat.read(path, as_version=4)
            place = tmp_path_factory.mktemp(path.stem)
            client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
            client.execute(cwd=str(place))
            found[path.stem] = notebook
    return found


def shown_by(notebook: Any, source: str) -> dict[str, Any]:
    """Return what the cell with that source showed: by mime type, and the text that it printed."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source]
    found: dict[str, Any] = {"printed": ""}
    for output in cell.outputs:
        found |= output.get("data", {})
        found["printed"] += output.get("text", "")
    return found


def test_a_first_run(executed: dict[str, Any]) -> None:
    notebook = executed["first_run"]
    run = shown_by(notebook, "fedlora.simulate(")
    assert re.search(r"clinics: +\d+%.*\| \d/6 .*accuracy=\d+\.\d%.*epsilon=\d\.\d+", run["printed"])
    assert "<th>epsilon</th>" in run["text/html"]
    assert run["text/plain"].startswith("RunResult('runs/clinics': ffa-lora, ")
    assert "image/png" in shown_by(notebook, "result.plot()")
    assert "north" in shown_by(notebook, "result.clients")["text/html"]
    assert re.search(r"^good - Kind.*\n^bad - Rude", shown_by(notebook, "best=True")["printed"], re.MULTILINE)
    exported = shown_by(notebook, "result.best.export()")
    assert "adapter_config.json" in exported["printed"]
    assert exported["text/plain"].startswith("RunResult(")


def test_privacy_against_accuracy(executed: dict[str, Any]) -> None:
    notebook = executed["privacy_accuracy"]
    table = shown_by(notebook, "runs = pd.DataFrame(rows)")["text/plain"]
    accuracy = {line.split()[0]: float(line.split()[1]) for line in table.splitlines()[3:]}
    assert list(accuracy) == ["1", "8", "none"]
    assert accuracy["none"] > 0.9
    assert "image/png" in shown_by(notebook, "runs.plot.scatter")


class Noted(logging.Handler):
    """Keeps what a handler of the user's would print."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("fedlora"):
            self.lines.append(record.getMessage())


@pytest.fixture
def noted() -> Iterator[Noted]:
    handler = Noted()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def in_a_loop(config: Config, folder: Path) -> RunResult:
    async def cell() -> RunResult:
        return simulate(config.model_dump(exclude_none=True), output=folder)

    return asyncio.run(cell())


def test_runs_inside_an_event_loop_log_every_line_once(config: Config, noted: Noted, tmp_path: Path) -> None:
    for name in ("first", "second"):
        noted.lines.clear()
        in_a_loop(config, tmp_path / name)
        written = (tmp_path / name / "run.log").read_text().splitlines()
        assert [line.split(" ", 3)[3] for line in written] == noted.lines
        assert noted.lines
        assert max(Counter(noted.lines).values()) == 1
    assert not logging.getLogger("fedlora").handlers


def test_workers_are_used_inside_an_event_loop(config: Config, ray_here: None, tmp_path: Path) -> None:
    section = config.simulation.model_copy(update={"workers": 1})
    result = in_a_loop(config.model_copy(update={"simulation": section}), tmp_path / "run")
    assert len(result.rounds) == 2


def test_a_bar_counts_rounds_and_shows_the_last_score(
    config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with rounds_bar(config) as progress:
        simulate(config.model_dump(exclude_none=True), output=tmp_path / "run", progress=progress)
    assert re.search(r"small: 100%.* 2/2 .*perplexity=\d", capsys.readouterr().err)


@pytest.mark.parametrize("logged", [True, False])
def test_a_note_is_shown_by_the_bar_or_by_the_users_logging(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logged: bool
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()] if logged else [])
    with rounds_bar(config) as progress:
        progress.on_note("a node does not take part")
    printed = capsys.readouterr()
    assert ("a node does not take part" in printed.out + printed.err) is not logged


def test_outside_of_a_notebook_nothing_is_shown(config: Config) -> None:
    with shown(config, None) as progress:
        assert progress is None
    own = Progress()
    with shown(config, own) as progress:
        assert progress is own
