"""Workers on GPUs are told once what the server's process lends them, those that replace others too."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from fedlora import shared_base
from fedlora.shared_base import Loan
from fedlora.simulation import ray_grid, ray_workers
from fedlora.simulation.ray_grid import RayGrid

LOAN = Loan("a model", ("GPU-0",), b"", ((b"counters", 3),))


class Actor:
    """Stands for a worker; keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[list[Loan]] = []
        self.prepared: list[Any] = []

    @property
    def borrow(self) -> Any:
        return type("Method", (), {"remote": staticmethod(self.told.append)})

    @property
    def prepare(self) -> Any:
        return type("Method", (), {"remote": staticmethod(lambda *a: self.prepared.append((a, list(self.told))))})

    @property
    def ready(self) -> Any:
        return type("Method", (), {"remote": staticmethod(lambda: None)})

    @classmethod
    def options(cls, **_: Any) -> Any:
        return lambda _: type("Class", (), {"remote": staticmethod(lambda *_: cls())})


class NoExchange:
    """Has no replies."""

    def __init__(self, *_: Any) -> None: ...

    def replies(self) -> list[Any]:
        return []


def _let_two_workers_start(monkeypatch: pytest.MonkeyPatch, started_ray: bool = False) -> None:
    monkeypatch.setattr(ray_workers, "start_ray", lambda _: started_ray)
    monkeypatch.setattr(ray_workers, "count_workers", lambda *_: 2)
    monkeypatch.setattr(ray_workers, "count_free", lambda number, *_: number)


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_workers_are_told_once_and_loans_end_with_the_grid(gpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Loan] = []
    monkeypatch.setattr(ray_grid, "RayExchange", NoExchange)
    monkeypatch.setattr(shared_base, "lend", lambda: [LOAN])
    monkeypatch.setattr(shared_base, "end_loans", ended.extend)
    monkeypatch.setattr(ray, "remote", Actor.options)
    monkeypatch.setattr(ray, "kill", lambda _: None)
    _let_two_workers_start(monkeypatch)
    grid = RayGrid("app", 4, gpus_per_worker=gpus)
    first = list(grid.actors)
    for _ in range(2):
        assert not list(grid._exchange([], None))
    grid.replace_worker(0, kill=True)
    assert [actor.told for actor in (*first[1:], *grid.actors)] == [[[LOAN]] if gpus else []] * 3
    grid.close()
    assert ended == ([LOAN] if gpus else [])
    grid.close()
    assert len(ended) == int(gpus)


@pytest.mark.parametrize("here", [True, False])
def test_workers_prepare_with_what_the_server_lends_and_knows_of_its_own_machine(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_base, "lend", lambda: [LOAN])
    monkeypatch.setattr(ray, "remote", Actor.options)
    _let_two_workers_start(monkeypatch, started_ray=here)
    grid = RayGrid("app", 4, gpus_per_worker=1.0, run_config={"config": "c"})
    known = {(64, 0): None}
    grid.prepare(known)
    for actor in grid.actors:
        (((context, told), lent),) = actor.prepared
        assert context.run_config == {"config": "c"}
        assert told == (known if here else {})
        assert lent == [[LOAN]]
