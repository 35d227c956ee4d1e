"""Workers start beside what the driver prepares, and end with the run, however that ends."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora import simulator
from fedlora.errors import InputError


class Opened:
    """A grid that knows which thread started it."""

    def __init__(self) -> None:
        self.thread, self.closed = threading.current_thread(), False

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        assert self.thread.is_alive()
        self.closed = True


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set by the driver; the grid opens only then."""
    event = threading.Event()

    def open_grid(*_: Any) -> Opened:
        assert event.wait(10.0)
        return Opened()

    monkeypatch.setattr(simulator, "_open_grid", open_grid)
    return event


def folder(workers: int | None) -> Any:
    return SimpleNamespace(resolved=SimpleNamespace(simulation=SimpleNamespace(workers=workers)))


def test_the_driver_goes_on_while_workers_start(prepared: threading.Event) -> None:
    with simulator._workers("app", folder(None)) as workers:
        prepared.set()
        grid: Any = workers()
        # Ray's processes would end with this thread.
        assert grid.thread is not threading.current_thread()
        assert grid.thread.is_alive()
        assert not grid.closed
    assert grid.closed


def test_a_run_in_this_process_opens_in_this_thread(prepared: threading.Event) -> None:
    prepared.set()
    with simulator._workers("app", folder(0)) as workers:
        grid: Any = workers()
        assert grid.thread is threading.current_thread()
    assert grid.closed


def test_an_error_of_the_data_ends_the_workers(prepared: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Opened] = []
    monkeypatch.setattr(Opened, "close", lambda grid: closed.append(grid))

    def run() -> None:
        with simulator._workers("app", folder(None)):
            prepared.set()
            raise InputError("data.name", "x", "is not there")

    with pytest.raises(InputError, match=r"data\.name"):
        run()
    assert len(closed) == 1


def test_an_error_of_the_workers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise InputError("simulation.workers", 9, "do not fit")

    monkeypatch.setattr(simulator, "_open_grid", fail)
    with pytest.raises(InputError, match=r"simulation\.workers"), simulator._workers("app", folder(None)) as workers:
        workers()
