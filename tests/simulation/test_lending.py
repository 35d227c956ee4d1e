"""Workers on GPUs are told once what the server's process lends them, those that replace others too."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from fedlora import shared_base
from fedlora.shared_base import Loan
from fedlora.simulation import ray_grid
from fedlora.simulation.ray_grid import RayGrid

LOAN = Loan("a model", ("GPU-0",), b"", ((b"counters", 3),))


class Actor:
    """Stands for a worker; keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[list[Loan]] = []

    @property
    def borrow(self) -> Any:
        return type("Method", (), {"remote": staticmethod(self.told.append)})

    @classmethod
    def options(cls, **_: Any) -> Any:
        return lambda _: type("Class", (), {"remote": staticmethod(lambda *_: cls())})


class NoExchange:
    """Has no replies."""

    def __init__(self, *_: Any) -> None: ...

    def replies(self, _: Any) -> list[Any]:
        return []


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_workers_are_told_once_and_loans_end_with_the_grid(gpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Loan] = []
    monkeypatch.setattr(ray_grid, "RayExchange", NoExchange)
    monkeypatch.setattr(shared_base, "lend", lambda: [LOAN])
    monkeypatch.setattr(shared_base, "end_loans", ended.extend)
    monkeypatch.setattr(ray, "remote", Actor.options)
    monkeypatch.setattr(ray, "kill", lambda _: None)
    grid = RayGrid.__new__(RayGrid)
    grid.client_app, grid.cpus, grid.gpus = "app", 1, gpus
    grid._loans, grid._started_ray = [], False
    grid.actors = first = [Actor(), Actor()]
    for _ in range(2):
        assert not list(grid._exchange([], None))
    grid.replace_worker(0, kill=True)
    assert [actor.told for actor in (*first[1:], *grid.actors)] == [[[LOAN]] if gpus else []] * 3
    grid.close()
    assert ended == ([LOAN] if gpus else [])
    grid.close()
    assert len(ended) == int(gpus)
