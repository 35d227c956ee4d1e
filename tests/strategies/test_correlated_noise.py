"""Runs whose server correlates its noise over rounds: what they release, whom they ask, what they are charged for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedlora.config import Config, load_config
from fedlora.privacy.banded import band_coefficients
from fedlora.results.privacy_spent import explain_privacy
from fedlora.strategies.base import get_strategy
from fedlora.strategies.client_noise import ClientNoise
from tests.configs import override
from tests.llama_runs import OWNERS, LlamaRuns, adapter, lines, payload, table

DELTA = 1e-3


def config(bands: int, rounds: int = 12, fraction: float = 0.25, **privacy: Any) -> Config:
    content = override("privacy", {"mode": "client", "target_delta": DELTA, "bands": bands, **privacy})
    content["run"] = {"rounds": rounds}
    content["server"] = {"sampling": "poisson", "fraction_train": fraction}
    return load_config(content)


def noise_of(clients: int, bands: int, *, secret: bool = False, **given: Any) -> ClientNoise:
    noise = ClientNoise(config(bands, **given))
    noise.prepare(clients, secret=secret)
    return noise


def bare(noise: ClientNoise, numbers: int, rounds: int) -> torch.Tensor:
    """Release nothing but noise."""
    return torch.stack([noise.release(torch.zeros(numbers, dtype=torch.float64), 0, 0) for _ in range(rounds)])


@pytest.mark.parametrize("secret", [False, True])
def test_the_releases_have_the_covariance_of_the_inverse_scaled_to_the_clients(secret: bool) -> None:
    rounds, numbers, sigma, norm = 8, 40_000, 1.7, 3.0
    noise = noise_of(40, 3, rounds=rounds, noise_multiplier=sigma, clipping_norm=norm, secret=secret)
    drawn = bare(noise, numbers, rounds).numpy()
    c = sum(x * np.eye(rounds, k=-k) for k, x in enumerate(band_coefficients(3, rounds)))
    expected = np.linalg.inv(c.T @ c) * (sigma * norm / (0.25 * 40)) ** 2
    deviations = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) + expected**2) / math.sqrt(numbers)
    assert (np.abs(drawn @ drawn.T / numbers - expected) < 5 * deviations).all()
    # Far from that of noise that is drawn anew.
    assert abs(expected[1, 0]) > 20 * deviations[1, 0]


def test_without_bands_it_is_the_noise_that_it_was_bit_by_bit() -> None:
    noise = noise_of(40, 1, noise_multiplier=1.7, clipping_norm=3.0)
    for release, found in enumerate(bare(noise, 100, 3)):
        drawn = np.random.default_rng([0, release, 0xC1]).standard_normal(101)[1:]
        assert torch.equal(found, 1.7 * 3.0 * torch.from_numpy(drawn) / (0.25 * 40))
    assert noise.state_dict() == {"releases": 3, "norm": 3.0}


@pytest.mark.parametrize(("bands", "rounds", "fraction"), [(4, 14, 0.1), (5, 20, 0.2), (3, 3, 0.2)])
@pytest.mark.parametrize(
    ("accountant", "other", "within"), [("rdp", RdpAccountant, 0.02), ("prv", PLDAccountant, 0.015)]
)
def test_epsilon_is_dp_accountings_of_the_turns(
    bands: int, rounds: int, fraction: float, accountant: str, other: Any, within: float
) -> None:
    sigma = 1.3
    noise = noise_of(500, bands, rounds=rounds, fraction=fraction, noise_multiplier=sigma, accountant=accountant)
    steps = []
    for noise.releases in range(1, rounds + 1):
        row = noise.row()
        steps.append(row["steps"])
        if noise.releases not in (1, rounds):
            continue
        event = GaussianDpEvent(sigma)
        if fraction * bands < 1:
            event = PoissonSampledDpEvent(fraction * bands, event)
        event = SelfComposedDpEvent(event, -(-noise.releases // bands))
        assert row["epsilon"] == pytest.approx(other().compose(event).get_epsilon(DELTA), rel=within)
    # The clients that come first are charged.
    assert steps == [int(release % bands == 0) for release in range(rounds)]
    assert noise.row()["sample_rate"] == pytest.approx(fraction * bands)


def test_a_clients_whole_turns_cost_what_the_matrix_says() -> None:
    """Without sampling, the run is one Gaussian mechanism, of the sensitivity of C for all turns together."""
    bands, rounds, sigma = 4, 12, 3.0
    c = sum(x * np.eye(rounds, k=-k) for k, x in enumerate(band_coefficients(bands, rounds)))
    sensitivity = float(np.linalg.norm(c[:, ::bands].sum(1)))
    noise = noise_of(500, bands, rounds=rounds, noise_multiplier=sigma, accountant="prv")
    noise.releases = rounds
    event = GaussianDpEvent(sigma / sensitivity)
    assert noise.row()["epsilon"] == pytest.approx(PLDAccountant().compose(event).get_epsilon(DELTA), rel=0.01)


def test_a_round_that_is_repeated_takes_a_turn_of_its_own() -> None:
    strategy = get_strategy("fedit")(config(3, fraction=1 / 3, noise_multiplier=1.0))
    strategy.nodes = {client: client for client in range(9)}
    assert [strategy.sample(r) for r in (1, 2, 3, 4)] == [[0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 3, 6]]
    strategy.noise.prepare(9, secret=False)
    strategy.noise.releases = 3  # of two rounds, of which one was repeated
    assert strategy.sample(3) == [0, 3, 6]


PRIVATE: dict[str, Any] = {
    "run": {"rounds": 5},
    "privacy": {"mode": "client", "target_epsilon": 8.0, "target_delta": DELTA, "clipping_norm": 0.5, "bands": 2},
    "server": {"sampling": "poisson", "fraction_train": 0.4},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


def test_a_resumed_run_has_the_same_bits_and_epsilon(runs: LlamaRuns) -> None:
    whole, resumed = runs.run(**PRIVATE), runs.run(stop=3, **PRIVATE)
    a, b = adapter(whole), adapter(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert table(whole, "privacy.csv") == table(resumed, "privacy.csv")
    rows = table(whole, "privacy.csv")
    assert [row["steps"] for row in rows] == ["1", "0", "1", "0", "1"]
    epsilon = [float(row["epsilon"]) for row in rows]
    assert 0 < epsilon[0] == epsilon[1] < epsilon[2] == epsilon[3] < epsilon[4] <= 8
    assert epsilon[4] > 7.9


def test_groups_take_turns_and_the_forecast_knows_whom_a_round_asks(runs: LlamaRuns) -> None:
    sections = {**PRIVATE, "server": {"sampling": "fixed", "fraction_train": 0.5}}
    result, expected = runs.run(**sections), runs.forecast(**sections)
    asked = [line["clients"] for line in lines(result)]
    assert asked == [[client for client in range(OWNERS) if client % 2 == turn % 2] for turn in range(5)]
    for direction, said in (("down", expected.downlink_bytes), ("up", expected.uplink_bytes)):
        assert payload(result, direction) == said
    assert [one.bands for one in expected.band_noise] == [1, 2]
    note = "noise in a round's model, in clipping norms: bands = 1 has"
    assert any(note in line for line in (result.folder / "run.log").read_text().splitlines())


def test_the_epsilon_of_a_run_is_explained_and_computed_again(runs: LlamaRuns) -> None:
    spent = explain_privacy(runs.run(**PRIVATE).folder)
    assert [(entry[1], entry[2]) for entry in spent.history] == [(0.8, 3)]
    assert spent.recorded == spent.epsilon
    assert abs(spent.difference) < 0.02
    assert "correlated over 2 rounds" in spent.mechanism
    assert spent.neighbours == "one client with all its examples, and zeros in place of its update"


def test_a_run_without_bands_is_what_it_was(runs: LlamaRuns) -> None:
    privacy = {key: value for key, value in PRIVATE["privacy"].items() if key != "bands"}
    a, b = (adapter(runs.run(**{**PRIVATE, "privacy": given})) for given in (privacy, {**privacy, "bands": 1}))
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = adapter(runs.run(**PRIVATE))
    assert not all(torch.equal(a[name], other[name]) for name in a)
