"""What every sampling of clients must do, whoever registers it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.registry import CLIENT_SAMPLINGS
from fedlora.server.sampling import ClientSampling, get_sampling
from tests.configs import override
from tests.llama_runs import OWNERS, LlamaRuns, lines, payload

fractions = st.floats(0.01, 1)
clients = st.sets(st.integers(0, 200), max_size=40)


@pytest.fixture(params=CLIENT_SAMPLINGS.names(), scope="module")
def sampling(request: pytest.FixtureRequest) -> ClientSampling:
    return get_sampling(request.param)


@given(present=clients, server_round=st.integers(1, 10**5), seed=st.integers(0, 2**63 - 1), fraction=fractions)
def test_a_round_is_some_of_those_who_are_there(
    sampling: ClientSampling, present: set[int], server_round: int, seed: int, fraction: float
) -> None:
    chosen = sampling.sample(present, server_round, seed, fraction)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= present
    assert all(type(client) is int for client in chosen)
    assert len(chosen) <= sampling.most(len(present), fraction) <= len(present)
    # The same for whoever asks, in whatever order.
    assert sampling.sample(sorted(present, reverse=True), server_round, seed, fraction) == chosen
    assert sampling.sample(present, server_round, seed, 1.0) == sorted(present)


def test_seeds_and_rounds_draw_others(sampling: ClientSampling) -> None:
    first = sampling.sample(range(1000), 1, 0, 0.5)
    assert sampling.sample(range(1000), 2, 0, 0.5) != first
    assert sampling.sample(range(1000), 1, 1, 0.5) != first


def test_everybody_is_drawn_as_often_as_the_fraction_says(sampling: ClientSampling) -> None:
    counts = np.zeros(40)
    for server_round in range(1, 401):
        counts[sampling.sample(range(40), server_round, 3, 0.3)] += 1
    assert counts.mean() / 400 == pytest.approx(0.3, abs=0.02)
    assert np.abs(counts / 400 - 0.3).max() < 0.12  # five standard deviations


def test_configs_take_its_name(sampling: ClientSampling) -> None:
    assert load_config(override("server.sampling", sampling.name)).server.sampling == sampling.name


def test_a_fixed_round_is_the_one_that_it_always_was() -> None:
    rng = np.random.default_rng([5, 7, 0x5A])
    assert get_sampling("fixed").sample(range(10), 7, 5, 0.4) == sorted(rng.choice(10, 4, replace=False).tolist())
    assert len(get_sampling("fixed").sample(range(10), 1, 0, 0.01)) == 1


def test_a_poisson_client_does_not_depend_on_others() -> None:
    poisson = get_sampling("poisson")
    for server_round in range(1, 30):
        whole = poisson.sample(range(20), server_round, 0, 0.3)
        assert poisson.sample(range(10, 20), server_round, 0, 0.3) == [client for client in whole if client >= 10]
    assert any(not poisson.sample(range(5), server_round, 0, 0.05) for server_round in range(1, 30))


def test_replies_that_can_never_come_are_refused() -> None:
    wanted = {"fraction_train": 0.25, "min_replies": 2}
    with pytest.raises(InputError, match="a round asks 1 clients"):
        load_config(override("server", wanted))
    load_config(override("server", {**wanted, "sampling": "poisson"}))


def test_a_run_asks_those_who_were_drawn_and_the_forecast_knows_them(
    sampling: ClientSampling, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Some of these rounds have no client at all under Poisson sampling: they do not count, and the run goes on."""
    runs = LlamaRuns(tmp_path_factory.mktemp(sampling.name))
    sections = {"run": {"rounds": 5, "seed": 3}, "server": {"sampling": sampling.name, "fraction_train": 0.3}}
    result, expected = runs.run(**sections, stop=2), runs.forecast(**sections)
    drawn = [sampling.sample(range(OWNERS), server_round, 3, 0.3) for server_round in range(1, 6)]
    assert [line["clients"] for line in lines(result)] == drawn
    assert [line["counted"] for line in lines(result)] == [bool(clients) for clients in drawn]
    assert all(line["uncounted"] == "no client was drawn" for line in lines(result) if not line["clients"])
    for direction, said in zip(
        ("initial", "down", "up"), (expected.initial_bytes, expected.downlink_bytes, expected.uplink_bytes), strict=True
    ):
        assert payload(result, direction) == said
    assert expected.steps == sum(map(len, drawn))
    assert sampling.name != "poisson" or not all(drawn)
