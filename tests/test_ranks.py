"""Which rank each client has."""

from __future__ import annotations

import pytest

from fedlora.errors import InputError
from fedlora.experts import FULL
from fedlora.ranks import client_ranks, has_rank
from tests import tiny

NAMES = ["comp", "rec", "sci"]


def settings(**method):
    return tiny.settings("llama", data={"partition": {"kind": "natural", "column": "c"}}, method=method)


def ranks(names=NAMES, complete=True, **method):
    return client_ranks(settings(**method), names, complete=complete)


def test_every_way_of_saying_them():
    assert ranks(name="flexmore", rank=5) == [5, 5, 5]
    assert ranks(name="flexmore", ranks=[1, "full", 3]) == [1, FULL, 3]
    assert ranks(name="flexmore", ranks={"rec": 2, "0": 4, "sci": "full"}) == [4, 2, FULL]
    profile = {"4": 0.25, "full": 0.5, "16": 0.25}
    many = ranks([str(i) for i in range(400)], name="flexmore", device_profile=profile)
    assert many == ranks([str(i) for i in range(400)], name="flexmore", device_profile=profile)
    for rank, share in ((4, 0.25), (16, 0.25), (FULL, 0.5)):
        assert abs(many.count(rank) / 400 - share) < 0.08


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1, 2], "one rank for each of the 3 clients"),
        ({"comp": 1, "rec": 2}, "no rank for client sci"),
        ({"comp": 1, "rec": 2, "sci": 3, "art": 4}, "art.*is no client"),
    ],
)
def test_ranks_that_do_not_fit_the_clients(given, words):
    with pytest.raises(InputError, match=words):
        ranks(name="flexmore", ranks=given)


def test_ranks_are_kept_for_clients_that_may_come():
    for given in ([1, 2, 3, "full"], {"comp": 1, "1": 2, "sci": 3, "art": "full"}):
        assert ranks(complete=False, name="flexmore", ranks=given) == [1, 2, 3]
        config = settings(name="flexmore", ranks=given)
        assert [has_rank(config, i, name) for i, name in enumerate([*NAMES, "art", "law"])] == [True] * 4 + [False]
    with pytest.raises(InputError, match="one rank for each of the 3 clients"):
        ranks(complete=False, name="flexmore", ranks=[1, 2])
    assert has_rank(settings(name="flexmore", device_profile={"4": 1.0}), 99, "anybody")


def test_a_drawn_rank_stays_when_clients_come():
    profile = {"4": 0.25, "full": 0.5, "16": 0.25}
    names = [str(i) for i in range(40)]
    few, many = (ranks(names[:n], name="flexmore", device_profile=profile) for n in (10, 40))
    assert many[:10] == few
