"""How many processes fit: never more than Ray can place, never fewer."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.simulation.placement import Need, count_processes, count_workers, processes_on

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
