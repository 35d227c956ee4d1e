"""Workers that start before their grid, beside the imports of the run."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from fedlora import cli
from fedlora.config import Config, load_common
from fedlora.errors import InputError
from fedlora.simulation import ray_cluster, ray_workers
from fedlora.simulation.ray_workers import RayWorkers, start_early, take_workers

ASKED = ("module:app", 1, 1, 0.0, None)


class Workers:
    """Stands for RayWorkers; notes its end."""

    def __init__(self, *asked: Any) -> None:
        self.asked, self.closed = asked, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let no workers be there, nor start; return those that wait for a grid."""
    found: list[Any] = []
    monkeypatch.setattr(ray_workers, "_early", found)
    monkeypatch.setattr(ray_workers, "RayWorkers", Workers)
    return found


def test_ray_starts_in_the_main_thread_while_another_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: list[Any]
) -> None:
    (tmp_path / "slowly_imported.py").write_text(
        "import gc, threading\nstarted, done = threading.Event(), threading.Event()\nstarted.set()\n"
        "assert not gc.isenabled()\nassert done.wait(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    threads = []

    def start() -> Any:
        threads.append(threading.current_thread())
        deadline = threading.Event()
        while not hasattr(sys.modules.get("slowly_imported"), "done"):
            assert not deadline.wait(0.01)
        module: Any = sys.modules["slowly_imported"]
        assert module.started.wait(60)
        module.done.set()  # the import ends only if this runs beside it
        return Workers(*ASKED)

    start_early(["slowly_imported"], start)
    assert threads == [threading.main_thread()]
    assert gc.isenabled()
    gc.unfreeze()
    assert len(early) == 1


def test_an_import_that_fails_is_left_to_whoever_needs_it(early: list[Any]) -> None:
    start_early(["tests.no_such_module"], lambda: Workers(*ASKED))  # type: ignore[arg-type,return-value]
    assert len(early) == 1
    assert gc.isenabled()


def test_what_ray_refuses_is_left_for_the_grid_to_say(early: list[Any]) -> None:
    def refuse() -> RayWorkers:
        raise InputError("simulation.workers", 99, "only 2 fit")

    start_early([], refuse)
    assert early == []


def test_a_grid_takes_the_workers_that_it_would_start_and_ends_others(early: list[Any]) -> None:
    first = Workers(*ASKED)
    early.append(first)
    assert take_workers(*ASKED) is first  # type: ignore[comparison-overlap]
    assert (early, first.closed) == ([], False)
    early.append(first)
    other = take_workers("module:app", 2, 1, 0.0, None)
    assert (other.asked, first.closed, early) == (("module:app", 2, 1, 0.0, None), True, [])


def test_sigterm_while_ray_connects_stops_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise SystemExit(15)  # Ray's own handler

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        ray_cluster.start_ray(None)


# When the command starts them.


def common(tmp_path: Path, **overrides: Any) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nname = "m"\n[data]\nname = "d"\n[data.partition]\nclients = 2\n[method]\nname = "fedit"\n'
    )
    return load_common(path, {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Count early starts of a process that has yet to import, on a machine of eight cores."""
    found: list[Any] = []
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(ray_workers, "start_early", lambda modules, start: found.append((modules, start())))
    monkeypatch.setattr(cli, "import_modules", lambda modules: None)
    monkeypatch.delitem(sys.modules, "torch")
    return found


def test_the_command_starts_what_its_grid_will_take(starts: list[Any], tmp_path: Path) -> None:
    overrides = {"simulation__workers": 2, "simulation__cpus_per_worker": 3, "simulation__gpus_per_worker": 0.5}
    cli._start_early(common(tmp_path, **overrides), tmp_path / "out", False)
    ((modules, workers),) = starts
    assert workers.asked == ("fedlora.clients.client_app:app", 2, 3, 0.5, None)
    assert "fedlora.simulator" in modules


@pytest.mark.parametrize(
    ("overrides", "there", "resume"),
    [
        ({"simulation__workers": 0}, "", False),
        ({"simulation__cpus_per_worker": 5}, "", False),  # one has room: it trains in the run's own process
        ({"simulation__address": "127.0.0.1:1"}, "", False),
        ({"data__name": "nodes", "data__test": "t.csv"}, "", False),
        ({"method__name": "fedti"}, "", False),
        ({}, "out", False),  # is refused
        ({}, "", True),
        ({}, "out/summary.json", True),  # is finished
    ],
)
def test_nothing_starts_for_a_run_that_needs_no_workers_or_will_not_begin(
    overrides: dict[str, Any], there: str, resume: bool, starts: list[Any], tmp_path: Path
) -> None:
    config = common(tmp_path, **overrides)
    if there:
        (tmp_path / there).mkdir(parents=True)
    cli._start_early(config, tmp_path / "out", resume)
    assert starts == []


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"data__name": "missing.csv"}, "data.name"),
        ({"data__name": "a.csv", "data__text": "txt"}, "data.text"),
        ({"data__name": "a.csv", "data__test": "missing.csv"}, "data.test"),
        ({"data__name": "a.csv", "model__name": "asset:minilm"}, "model.name"),
        ({"data__name": "a.csv", "simulation__workers": 0, "data__label": "stars"}, "data.label"),
    ],
)
def test_nothing_starts_before_a_source_or_column_that_is_not_there_is_named(
    overrides: dict[str, Any], field: str, starts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "import_modules", lambda modules: pytest.fail("imported before"))
    (tmp_path / "a.csv").write_text("text,label\nfine,good\n")
    with pytest.raises(InputError) as caught:
        cli._start_early(common(tmp_path, **overrides), tmp_path / "out", False)
    assert (caught.value.field, starts) == (field, [])


def test_one_worker_that_is_asked_for_starts(starts: list[Any], tmp_path: Path) -> None:
    cli._start_early(common(tmp_path, simulation__workers=1, simulation__cpus_per_worker=5), tmp_path / "out", False)
    assert len(starts) == 1


def test_a_folder_may_have_any_name(starts: list[Any], tmp_path: Path) -> None:
    for name in ("n" * 300, "n\0"):
        cli._start_early(common(tmp_path), tmp_path / name, False)
    assert len(starts) == 2  # the run says what is wrong with it


def test_nothing_starts_early_where_everything_is_imported(starts: list[Any], tmp_path: Path) -> None:
    sys.modules["torch"] = sys.modules[__name__]
    cli._start_early(common(tmp_path), tmp_path / "out", False)
    assert starts == []


LIGHT = """
import sys
from fedlora.config import load_common
import fedlora.cli, fedlora.simulation.ray_workers
from fedlora.data.sources import check_sources
check_sources(load_common(sys.argv[1]))
assert not {"torch", "transformers", "flwr", "datasets"} & set(sys.modules), "slow"
import fedlora.simulator, fedlora.clients.client_app
assert not {"peft", "bitsandbytes", "matplotlib", "datasets"} & set(sys.modules), "not needed before the first step"
"""


def test_what_comes_before_ray_and_before_the_first_step_imports_little(tmp_path: Path) -> None:
    common(tmp_path)
    command = [sys.executable, "-c", LIGHT, str(tmp_path / "run.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
