"""How many processes fit: never more than Ray can place, never fewer; and whether the run's own is enough."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora.config import SimulationSection
from fedlora.errors import InputError
from fedlora.simulation.placement import (
    Need,
    count_processes,
    count_workers,
    in_own_process,
    processes_on,
)

PARTS = 100
"""Of a card, so that the count by hand is exact."""


def placed(cores: int, cards: int, cpus: int, share: int) -> int:
    """Place one process after the other, each on the first card with room for its whole share."""
    free, count = [PARTS] * cards, 0
    while cores >= cpus and (not share or any(room >= share for room in free)):
        cores, count = cores - cpus, count + 1
        if share:
            free[next(card for card, room in enumerate(free) if room >= share)] -= share
    return count


@given(st.integers(0, 64), st.integers(0, 8), st.integers(1, 8), st.integers(0, PARTS))
@example(64, 2, 1, 15)  # 6 on a card, although two cards in one piece had room for 13
@example(64, 3, 1, 33)
def test_as_many_fit_as_can_be_placed(cores: int, cards: int, cpus: int, share: int) -> None:
    needs = [Need("CPU", cpus, "c", cpus), Need("GPU", share / PARTS, "g", share / PARTS)]
    assert processes_on({"CPU": cores, "GPU": cards}, needs) == placed(cores, cards, cpus, share)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3))
def test_whole_cards_are_of_one_machine(cards: list[int], each: int) -> None:
    need = Need("GPU", each, "g", each)
    assert sum(processes_on({"GPU": there}, [need]) for there in cards) == sum(there // each for there in cards)


def nodes(monkeypatch: pytest.MonkeyPatch, *machines: dict[str, float]) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": machine} for machine in machines])


def test_workers_share_one_card_each(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 64, "GPU": 2})
    assert count_workers(None, 1, 0.15) == 12
    with pytest.raises(InputError, match=r"simulation\.workers = 13: only 12 fit"):
        count_workers(13, 1, 0.15)


@pytest.mark.parametrize(
    ("machines", "message"),
    [
        ([{"CPU": 8}], "g = 2: Ray sees no GPU"),
        ([{"CPU": 8, "GPU": 1}], r"g = 2: no machine has room for a worker \(the most there is: 1\)"),
        ([{"CPU": 1, "GPU": 4}], r"c = 4: no machine has room for a worker \(the most there is: 1\)"),
        ([{"CPU": 8}, {"CPU": 1, "GPU": 4}], "g = 2: no machine has room for a worker with all of c, g"),
    ],
)
def test_what_is_missing_is_named(
    machines: list[dict[str, float]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, *machines)
    with pytest.raises(InputError, match=message):
        count_processes([Need("CPU", 4, "c", 4), Need("GPU", 2, "g", 2)], "worker")


@pytest.mark.parametrize(
    ("section", "cores", "cards", "expected"),
    [
        ({"gpus_per_worker": 1.0}, 16, 1, True),
        ({"gpus_per_worker": 0.7}, 16, 1, True),
        ({"gpus_per_worker": 2.0}, 16, 3, True),
        ({"gpus_per_worker": 1.0}, 16, 2, False),
        ({"gpus_per_worker": 0.5}, 16, 1, False),
        ({"gpus_per_worker": 1.0}, 16, 0, False),  # is refused
        ({"gpus_per_worker": 1.0, "workers": 1}, 16, 1, False),
        ({"gpus_per_worker": 1.0, "address": "auto"}, 16, 1, False),
        ({}, 1, 1, True),
        ({}, 2, 1, False),
        ({"cpus_per_worker": 3}, 4, 0, True),
        ({"cpus_per_worker": 5}, 4, 0, False),  # is refused
        ({"workers": 0}, 16, 8, True),
    ],
)
def test_clients_train_in_the_run_where_one_worker_alone_fits(
    section: dict[str, Any], cores: int, cards: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert in_own_process(SimulationSection(**section)) is expected


def test_a_ray_that_runs_already_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    assert not in_own_process(SimulationSection())
    assert in_own_process(SimulationSection(workers=0))
