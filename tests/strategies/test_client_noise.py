"""Whole clients are protected: clipped updates of equal weight, noise on their sum, an epsilon that others compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import Config, load_config
from fedlora.errors import GuardError, InputError
from fedlora.methods import get_method, methods
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.strategies.client_noise import ClientNoise, NoisyUpdates
from fedlora.strategies.updates import Update
from tests.configs import override
from tests.llama_runs import OWNERS, LlamaRuns, adapter, lines, payload, table

DELTA = 1e-3
SHAPES = {"a": (3, 4), "b": (5,)}
SIZE = 17


def config(rounds: int = 3, fraction: float = 1.0, method: dict[str, Any] | None = None, **privacy: Any) -> Config:
    content = override("privacy", {"mode": "client", "target_delta": DELTA, **privacy})
    content["run"] = {**content.get("run", {}), "rounds": rounds}
    content["server"] = {"sampling": "poisson", "fraction_train": fraction}
    if method:
        content["method"] = method
    return load_config(content)


def noise_of(clients: int, **sections: Any) -> ClientNoise:
    noise = ClientNoise(config(**sections))
    noise.prepare(clients, secret=False)
    return noise


def updates(vectors: list[torch.Tensor]) -> Iterator[Update]:
    return iter([Update(k, 100.0 * k + 1, vector, SHAPES) for k, vector in enumerate(vectors)])


def flat(arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([arrays[name].reshape(-1) for name in SHAPES])


@given(
    clients=st.integers(1, 6),
    drawn=st.integers(0, 6),
    norm=st.floats(1e-3, 1e3),
    scale=st.floats(1e-2, 1e2),
    fraction=st.sampled_from([0.25, 1.0]),
)
def test_without_noise_it_is_the_sum_of_clipped_moves_over_the_expected_number(
    clients: int, drawn: int, norm: float, scale: float, fraction: float
) -> None:
    generator = torch.Generator().manual_seed(drawn)
    start = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    vectors = [start + scale * torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(drawn)]
    noise = noise_of(clients, fraction=fraction, noise_multiplier=0.0, clipping_norm=norm)
    mean = flat(NoisyUpdates(updates(vectors), start, SHAPES, noise).mean())
    expected = start.clone()
    for vector in vectors:
        move = vector - start
        expected += move / max(1.0, float(move.norm()) / norm) / (fraction * clients)
    assert torch.allclose(mean, expected, rtol=1e-9, atol=1e-9)


def test_one_client_moves_the_sum_by_the_norm_at_most_whatever_it_sends() -> None:
    start = torch.zeros(SIZE, dtype=torch.float64)
    few = [torch.full((SIZE,), 0.1, dtype=torch.float64)]
    for size in (1e-8, 1.0, 1e30):
        more = [*few, torch.full((SIZE,), size, dtype=torch.float64)]
        sums = []
        for vectors in (few, more):
            noise = noise_of(4, noise_multiplier=1.0, clipping_norm=0.5)
            sums.append(4 * flat(NoisyUpdates(updates(vectors), start, SHAPES, noise).mean()))
        assert float((sums[1] - sums[0]).norm()) <= 0.5 * (1 + 1e-12)


def test_the_noise_has_the_stated_variance_and_differs_from_round_to_round() -> None:
    size, start = 40_000, torch.zeros(40_000, dtype=torch.float64)
    noise = noise_of(8, fraction=0.5, noise_multiplier=1.7, clipping_norm=3.0)
    shapes = {"a": (size,)}
    drawn = [NoisyUpdates(iter([]), start, shapes, noise).mean()["a"] for _ in range(3)]
    for vector in drawn:
        assert abs(float(vector.std()) / (1.7 * 3.0 / 4) - 1) < 4 / math.sqrt(2 * size)
        assert abs(float(vector.mean())) < 4 * 1.7 * 3.0 / 4 / math.sqrt(size)
    assert abs(float(np.corrcoef(drawn[0], drawn[1])[0, 1])) < 4 / math.sqrt(size)
    again = noise_of(8, fraction=0.5, noise_multiplier=1.7, clipping_norm=3.0)
    assert torch.equal(NoisyUpdates(iter([]), start, shapes, again).mean()["a"], drawn[0])
    again.prepare(8, secret=True)
    assert not torch.equal(NoisyUpdates(iter([]), start, shapes, again).mean()["a"], drawn[1])


@pytest.mark.parametrize(("fraction", "rounds", "sigma"), [(1.0, 10, 6.0), (0.1, 100, 1.0), (0.02, 500, 0.8)])
@pytest.mark.parametrize(
    ("accountant", "other", "within"), [("rdp", RdpAccountant, 0.02), ("prv", PLDAccountant, 0.01)]
)
def test_epsilon_is_that_of_dp_accounting(
    fraction: float, rounds: int, sigma: float, accountant: str, other: Any, within: float
) -> None:
    noise = noise_of(500, fraction=fraction, rounds=rounds, noise_multiplier=sigma, accountant=accountant)
    noise.releases = rounds
    event = GaussianDpEvent(sigma) if fraction == 1 else PoissonSampledDpEvent(fraction, GaussianDpEvent(sigma))
    theirs = other().compose(SelfComposedDpEvent(event, rounds)).get_epsilon(DELTA)
    assert noise.row()["epsilon"] == pytest.approx(theirs, rel=within)


def test_with_a_noisy_count_both_releases_cost_what_one_would() -> None:
    plan = noise_of(100, noise_multiplier=2.0, adaptive_clipping=True).plan
    assert plan is not None
    assert plan.count_noise == 5.0
    assert plan.update_noise_multiplier > 2.0
    # Two Gaussian releases on the same clients: squared shares of noise add up. The count changes by 1/2.
    together = plan.update_noise_multiplier**-2 + (plan.count_noise / 0.5) ** -2
    assert together == pytest.approx(2.0**-2)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_the_norm_comes_to_the_quantile_of_the_updates(quantile: float) -> None:
    noise = noise_of(900, noise_multiplier=1.0, clipping_norm=0.01, adaptive_clipping=True, clipping_quantile=quantile)
    start = torch.zeros(SIZE, dtype=torch.float64)
    lengths = torch.linspace(1, 2, 900, dtype=torch.float64)
    vectors = [torch.eye(1, SIZE, dtype=torch.float64)[0] * length for length in lengths]
    for _ in range(150):
        NoisyUpdates(updates(vectors), start, SHAPES, noise).mean()
    assert noise.norm == pytest.approx(1 + quantile, abs=0.1)


def test_single_updates_are_not_shown() -> None:
    noise = noise_of(4, noise_multiplier=1.0)
    with pytest.raises(GuardError, match="reads_single_updates"):
        next(iter(NoisyUpdates(updates([torch.zeros(SIZE)]), torch.zeros(SIZE), SHAPES, noise)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"name": "flora"}}, r"privacy\.mode = 'client': needs a method whose aggregate is a mean; flora"),
        (
            {"method": {"name": "ffa-lora", "rank": 4, "ranks": [2, 4, 4, 4]}},
            r"privacy\.mode = 'client': needs updates of one",
        ),
        ({"method": {"name": "fed-sb", "rank": 4, "init": "pooled"}}, r"method\.init = 'pooled'"),
    ],
)
def test_what_noise_on_the_sum_does_not_cover_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(noise_multiplier=1.0, **sections)


def test_a_fixed_share_of_the_clients_is_refused_and_all_of_them_are_not() -> None:
    content = override("privacy", {"mode": "client", "noise_multiplier": 1.0, "target_delta": DELTA})
    assert mechanism_of(load_config(content)).name == "client"
    with pytest.raises(InputError, match=r"server\.sampling = 'fixed': has no accountant"):
        load_config({**content, "server": {"fraction_train": 0.5}})


@pytest.mark.parametrize(
    ("privacy", "clients", "message"),
    [
        ({"noise_multiplier": 1.0}, 1000, r"privacy\.target_delta = 0\.001: must be below 1 / N"),
        ({"target_epsilon": 1e-8, "target_delta": 1e-12}, 10, r"privacy\.target_epsilon"),
        ({"noise_multiplier": 3.0, "adaptive_clipping": True}, 10, r"privacy\.adaptive_clipping = True: needs more"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(privacy: dict[str, Any], clients: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        noise_of(clients, **privacy)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


PRIVATE: dict[str, Any] = {"mode": "client", "target_epsilon": 8.0, "target_delta": DELTA, "clipping_norm": 0.5}


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_runs_under_it_or_says_why_not(runs: LlamaRuns, name: str) -> None:
    sections: dict[str, Any] = {"method": {"name": name, "rank": 2}, "run": {"rounds": 2}, "privacy": PRIVATE}
    if name == "peft":
        sections["method"] = {"name": name, "peft_type": "LORA"}
    if get_method(name).reads_single_updates:
        with pytest.raises(InputError, match=r"privacy\.mode"):
            runs.config(**sections)
        return
    result = runs.run(**sections)
    rows = table(result, "privacy.csv")
    assert [row["client"] for row in rows] == ["all", "all"]
    epsilon = [float(row["epsilon"]) for row in rows]
    assert 0 < epsilon[0] < epsilon[1] <= 8
    assert epsilon[1] > 7.9
    said = result.summary["epsilon"]
    assert said["max"] == epsilon[1]
    assert (said["mode"], said["unit"]) == ("client", "one client with all its examples")


@pytest.mark.parametrize(("method", "adaptive"), [("fedsvd", True), ("rolora", False)])
def test_a_resumed_run_has_the_same_bits_and_epsilon(runs: LlamaRuns, method: str, adaptive: bool) -> None:
    privacy = {"mode": "client", "noise_multiplier": 0.3, "target_delta": DELTA, "adaptive_clipping": adaptive}
    sections: dict[str, Any] = {"method": {"name": method, "rank": 2}, "privacy": privacy}
    whole, resumed = runs.run(**sections), runs.run(stop=2, **sections)
    a, b = adapter(whole), adapter(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert table(whole, "privacy.csv") == table(resumed, "privacy.csv")


def test_rounds_without_clients_count_and_get_their_noise(runs: LlamaRuns) -> None:
    privacy = {"mode": "client", "noise_multiplier": 1.0, "target_delta": DELTA}
    server = {"sampling": "poisson", "fraction_train": 0.1}
    sections: dict[str, Any] = {"run": {"rounds": 6}, "privacy": privacy, "server": server}
    result = runs.run(**sections)
    rounds = lines(result)
    assert any(not line["clients"] for line in rounds)
    assert all(line["counted"] for line in rounds)
    assert len(table(result, "privacy.csv")) == 6
    assert payload(result, "up") == runs.forecast(**sections).uplink_bytes


def test_nothing_of_single_clients_moves_is_reported(runs: LlamaRuns) -> None:
    rounds = lines(runs.run(privacy=PRIVATE))
    assert all(line["drift"] is None for line in rounds)
    assert not any(line["train_loss_covered"] for line in rounds)
    assert len(rounds[0]["clients"]) == OWNERS
