"""What every aggregator must do, whoever registers it; those of Flower's that have ours give the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import load_config, unused_keys
from fedlora.errors import InputError
from fedlora.methods import get_method, methods
from fedlora.registry import AGGREGATORS
from fedlora.server.aggregators import Aggregator, aggregator_of
from tests.configs import override
from tests.llama_runs import LlamaRuns, adapter, lines, payload

CLIENTS, SIZE = 9, 5


def made(name: str, **server: Any) -> Aggregator:
    return aggregator_of(load_config(override("server", {"aggregator": name, **server})))


@pytest.fixture(params=AGGREGATORS.names(), scope="module")
def aggregator(request: pytest.FixtureRequest) -> Aggregator:
    return made(request.param)


def drawn(seed: int, clients: int = CLIENTS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(clients, SIZE, generator=generator, dtype=torch.float64)
    return moves, torch.randint(1, 100, (clients,), generator=generator).double()


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_it_follows_its_clients(aggregator: Aggregator, seed: int, scale: float) -> None:
    """Whatever their order, where they start from, and how far they go."""
    moves, weights = drawn(seed)
    found = aggregator.combine(moves, weights)
    assert found.shape == (SIZE,)
    order = torch.randperm(CLIENTS, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(aggregator.combine(moves[order], weights[order]), found)
    shift = torch.arange(SIZE, dtype=torch.float64)
    assert torch.allclose(aggregator.combine(scale * moves + shift, weights), scale * found + shift, atol=1e-9)


def test_clients_that_agree_are_followed(aggregator: Aggregator) -> None:
    moves, weights = drawn(1)
    assert torch.allclose(aggregator.combine(moves[:1].expand(CLIENTS, SIZE), weights), moves[0])
    assert torch.allclose(
        aggregator.combine(moves[:1].expand(aggregator.fewest, SIZE), weights[: aggregator.fewest]), moves[0]
    )


@given(seed=st.integers(0, 10**6), wrong=st.floats(1e3, 1e12), sign=st.sampled_from([-1.0, 1.0]))
def test_a_robust_one_stays_among_the_honest(aggregator: Aggregator, seed: int, wrong: float, sign: float) -> None:
    moves, weights = drawn(seed)
    honest = moves[1:]
    moves[0] = sign * wrong
    inside = aggregator.combine(moves, weights)
    within = bool(((honest.min(dim=0).values <= inside) & (inside <= honest.max(dim=0).values)).all())
    assert within == aggregator.robust


@given(seed=st.integers(0, 10**6), clients=st.integers(5, 12), share=st.sampled_from([0.1, 0.2, 0.25]))
def test_flowers_own_functions_give_the_same(seed: int, clients: int, share: float) -> None:
    moves, weights = drawn(seed, clients)
    results = [([move.numpy()], 1) for move in moves]
    (median,) = aggregate_median(results)
    assert np.allclose(made("median").combine(moves, weights), median)
    (krum,) = aggregate_krum(results, 1, 0)
    assert np.allclose(made("krum", malicious_clients=1).combine(moves, weights), krum)
    if share * clients == int(share * clients):  # Flower rounds down, which leaves wrong ones in
        (trimmed,) = aggregate_trimmed_avg(results, share)
        assert np.allclose(made("trimmed-mean", trimmed_share=share).combine(moves, weights), trimmed)


def test_configs_take_its_name_and_note_keys_that_it_does_not_read(aggregator: Aggregator) -> None:
    keys = {"trimmed_share": 0.2, "malicious_clients": 2}
    config = load_config(override("server", {"aggregator": aggregator.name, **keys}))
    assert config.server.aggregator == aggregator.name
    noted = {note.partition(" ")[0].removeprefix("server.") for note in unused_keys(config)} & set(keys)
    assert noted == set(keys) - set(aggregator.uses)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


def test_a_run_has_it(aggregator: Aggregator, runs: LlamaRuns) -> None:
    server = {"aggregator": aggregator.name, "malicious_clients": 0}
    whole, resumed = runs.run(server=server), runs.run(stop=2, server=server)
    a, b = adapter(whole), adapter(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(line["counted"] for line in lines(whole))
    assert (lines(whole)[0]["drift"] is None) == aggregator.robust
    assert payload(whole, "up") == runs.forecast(server=server).uplink_bytes


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_method_whose_aggregate_is_no_mean_is_refused(runs: LlamaRuns, name: str) -> None:
    method = {"name": name, "peft_type": "LORA"} if name == "peft" else {"name": name, "rank": 2}
    sections: dict[str, Any] = {"method": method, "server": {"aggregator": "median"}}
    if get_method(name).reads_single_updates:
        with pytest.raises(InputError, match=r"server\.aggregator = 'median'.*use mean"):
            runs.config(**sections)
    else:
        assert runs.config(**sections).server.aggregator == "median"


def test_a_round_of_too_few_clients_does_not_count(runs: LlamaRuns) -> None:
    result = runs.run(server={"aggregator": "krum", "malicious_clients": 1})
    assert {line["uncounted"] for line in lines(result)} == {"krum needs 5 replies, and 4 came"}


@pytest.mark.parametrize("method", ["ffa-lora", "fedit", "hetlora"])
def test_a_longer_move_is_shortened(runs: LlamaRuns, method: str) -> None:
    sections: dict[str, Any] = {"method": {"name": method, "rank": 2}, "run": {"rounds": 1}}
    free = adapter(runs.run(**sections))
    loose = adapter(runs.run(**sections, server={"max_update_norm": 1e6}))
    tight = adapter(runs.run(**sections, server={"max_update_norm": 1e-9}))
    assert all(torch.allclose(free[name], loose[name], atol=1e-6) for name in free)
    ups = [name for name in free if "lora_B" in name]  # which start at 0
    assert max(float(free[name].abs().max()) for name in ups) > 1e-5
    assert max(float(tight[name].abs().max()) for name in ups) < 1e-7


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"server": {"aggregator": "best"}}, r"server\.aggregator = 'best'.*median"),
        ({"server": {"aggregator": "krum"}, "method": {"ranks": [1, 2, 2, 2]}}, r"server\.aggregator = 'krum'.*mixed"),
        (
            {"server": {"aggregator": "krum"}, "privacy": {"mode": "client", "noise_multiplier": 1.0}},
            r"server\.aggregator = 'krum': adds noise to a sum",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(runs: LlamaRuns, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        runs.config(**sections)
