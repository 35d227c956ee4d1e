"""Noise correlated over rounds by a banded matrix C: A = B C, covariance (C^T C)^-1, what a client's turns change."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from fedlora.config import Config, load_config, unused_keys
from fedlora.errors import InputError
from fedlora.privacy.banded import BandedNoise, band_advice, band_coefficients, compare_bands, prefix_error
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.registry import SERVER_OPTIMIZERS
from fedlora.server.sampling import whose_turn
from tests.configs import override

SHAPES = [(1, 5), (2, 9), (3, 8), (4, 4), (5, 40)]
"""Bands and rounds."""


def matrix(bands: int, rounds: int) -> np.ndarray:
    """C."""
    column = np.zeros(rounds)
    column[:bands] = band_coefficients(bands, rounds)
    return np.tril(toeplitz(column))


def square_root(bands: int) -> tuple[float, ...]:
    """The first coefficients of (1 - x)^(-1/2), of norm 1."""
    column = np.cumprod([1.0, *(1 - 0.5 / k for k in range(1, bands))])
    return tuple(column / np.linalg.norm(column))


def config(bands: int = 4, rounds: int = 40, fraction: float = 0.05, **sections: dict[str, Any]) -> Config:
    privacy = {"mode": "client", "target_epsilon": 8.0, "target_delta": 1e-4, "bands": bands}
    content = override("privacy", {**privacy, **sections.pop("privacy", {})})
    content["run"] = {"rounds": rounds}
    content["server"] = {"sampling": "poisson", "fraction_train": fraction, **sections.pop("server", {})}
    return load_config({**content, **sections})


@pytest.mark.parametrize(("bands", "rounds"), SHAPES)
def test_b_times_c_sums_the_rounds_and_the_error_is_that_of_b(bands: int, rounds: int) -> None:
    c, a = matrix(bands, rounds), np.tril(np.ones((rounds, rounds)))
    assert np.allclose(np.triu(c, 1), 0)
    assert np.allclose(np.tril(c, -bands), 0)
    assert np.count_nonzero(c[:, 0]) == min(bands, rounds)
    assert np.linalg.norm(c, axis=0).max() == pytest.approx(1, abs=1e-12)
    b = a @ np.linalg.inv(c)
    assert np.allclose(b @ c, a, atol=1e-12)
    assert prefix_error(band_coefficients(bands, rounds), rounds) == pytest.approx(
        np.linalg.norm(b) / math.sqrt(rounds), rel=1e-12
    )


@pytest.mark.parametrize("rounds", [30, 3000])
def test_more_bands_give_less_noise_and_never_more_than_the_square_root(rounds: int) -> None:
    errors = [prefix_error(band_coefficients(bands, rounds), rounds) for bands in (1, 2, 4, 8, 16)]
    assert all(more < less for less, more in itertools.pairwise(errors))
    for bands, error in zip((2, 4, 8, 16), errors[1:], strict=True):
        assert error <= prefix_error(square_root(bands), rounds) * (1 + 1e-9)
    assert errors[0] == pytest.approx(math.sqrt((rounds + 1) / 2))


@settings(max_examples=20)
@given(bands=st.integers(2, 6), rounds=st.integers(6, 60), seed=st.integers(0, 99))
def test_no_other_coefficients_near_give_less(bands: int, rounds: int, seed: int) -> None:
    """It is a least value: a draw around it is no better, whatever its norm."""
    best = np.array(band_coefficients(bands, rounds))
    other = best * np.exp(0.02 * np.random.default_rng(seed).standard_normal(bands))
    error = prefix_error(tuple(other / np.linalg.norm(other)), rounds)
    assert error >= prefix_error(tuple(best), rounds) * (1 - 1e-6)


@pytest.mark.parametrize(("bands", "rounds"), SHAPES)
def test_the_rows_are_those_of_the_inverse_with_the_last_ones_kept(bands: int, rounds: int) -> None:
    noise = BandedNoise(band_coefficients(bands, rounds))
    normal = torch.randn(rounds, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # Beside a drawn G, the unit matrix: its rows give C^-1 itself, and so the covariance.
    source = torch.cat([normal, torch.eye(rounds, dtype=torch.float64)], 1)
    rows = []
    for row in source:
        rows.append(noise.next(row))
        assert len(noise.earlier) <= bands - 1
    made, c = torch.stack(rows).numpy(), matrix(bands, rounds)
    assert np.allclose(c @ made[:, :7], normal.numpy(), atol=1e-10)
    inverse = made[:, 7:]
    assert np.allclose(inverse @ inverse.T, np.linalg.inv(c.T @ c), atol=1e-9)


def test_one_band_is_the_noise_itself_bit_by_bit() -> None:
    noise, row = BandedNoise(band_coefficients(1, 10)), torch.randn(1000, dtype=torch.float64)
    assert all(torch.equal(noise.next(row), row) for _ in range(3))
    assert noise.earlier == []


def test_noise_goes_on_from_its_state_with_the_same_bits() -> None:
    source = torch.randn(9, 5, dtype=torch.float64)
    whole = BandedNoise(band_coefficients(4, 9))
    expected = [whole.next(row) for row in source]
    for stop in (0, 2, 5):
        first, second = BandedNoise(band_coefficients(4, 9)), BandedNoise((1.0,))
        for row in source[:stop]:
            first.next(row)
        second.load_state_dict(first.state_dict())
        assert all(torch.equal(second.next(source[k]), expected[k]) for k in range(stop, 9))


def turns(rounds: int, bands: int) -> list[tuple[int, ...]]:
    """All sets of rounds that are ``bands`` apart at least."""
    sets = itertools.chain.from_iterable(itertools.combinations(range(rounds), k) for k in range(1, rounds + 1))
    return [chosen for chosen in sets if all(b - a >= bands for a, b in itertools.pairwise(chosen))]


@pytest.mark.parametrize(("bands", "rounds"), [(1, 5), (2, 7), (3, 8), (4, 9)])
def test_a_clients_turns_change_the_release_by_the_root_of_their_number_at_most(bands: int, rounds: int) -> None:
    """By all sets of turns, all signs and drawn directions; two updates that are closer would change it by more."""
    c, most = matrix(bands, rounds), 0.0
    rng = np.random.default_rng(0)
    for chosen in turns(rounds, bands):
        columns, bound = c[:, list(chosen)], math.sqrt(len(chosen))
        for signs in itertools.product((-1, 1), repeat=len(chosen)):
            most = max(most, float(np.linalg.norm(columns @ np.array(signs))))
        directions = rng.standard_normal((len(chosen), 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        assert np.linalg.norm(columns @ directions) <= bound * (1 + 1e-12)
        # Each turn is a mechanism by itself: what it changes, no other one does.
        assert (np.count_nonzero(columns, axis=1) <= 1).all()
    steps = -(-rounds // bands)
    assert most <= math.sqrt(steps) * (1 + 1e-12)
    assert most >= math.sqrt(rounds // bands) * (1 - 1e-12)
    if bands > 1:
        assert np.linalg.norm(c[:, 0] + c[:, 1]) > math.sqrt(2) * 1.01


@given(clients=st.sets(st.integers(0, 60), min_size=1, max_size=30), groups=st.integers(1, 7), first=st.integers(0, 20))
def test_each_client_has_one_turn_in_as_many_as_there_are_groups(clients: set[int], groups: int, first: int) -> None:
    asked = [whose_turn(clients, turn, groups) for turn in range(first, first + groups)]
    assert sorted(itertools.chain.from_iterable(asked)) == sorted(clients)
    assert asked[0] == whose_turn(sorted(clients, reverse=True), first + groups, groups)
    for other in list(clients)[:3]:
        assert whose_turn(clients - {other}, first, groups) == [client for client in asked[0] if client != other]


@pytest.mark.parametrize(("epsilon", "least"), [(8.0, 10), (3.0, 5), (1.0, 1)])
def test_at_equal_epsilon_correlated_noise_is_less_where_epsilon_is_not_small(epsilon: float, least: int) -> None:
    """1,000 clients, of which a round asks 50, 200 rounds: the models' noise, and the advice of a plan."""
    found = compare_bands(config(10, 200, privacy={"target_epsilon": epsilon}), 1000)
    noise = {one.bands: one.model_noise for one in found}
    assert list(noise) == [1, 5, 10, 20]
    assert min(noise, key=lambda bands: noise[bands]) == least
    if epsilon == 8.0:
        assert noise[10] < 0.75 * noise[1]
    assert band_advice(found).endswith(f"bands = {least} has the least")
    one, ten = found[0], found[2]
    assert one.model_noise == pytest.approx(one.noise_multiplier * math.sqrt(201 / 2) / 50)
    assert ten.model_noise == pytest.approx(ten.noise_multiplier * prefix_error(band_coefficients(10, 200), 200) / 50)


def test_the_guide_has_these_figures() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "privacy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d. |]+) \|$", guide, re.MULTILINE)
    assert [epsilon for epsilon, _ in rows] == ["1", "3", "8"]
    for epsilon, told in rows:
        for bands, figure in zip((1, 2, 5, 10, 20), told.split(" | "), strict=True):
            own = compare_bands(config(max(2, bands), 200, privacy={"target_epsilon": float(epsilon)}), 1000)
            assert f"{next(one.model_noise for one in own if one.bands == bands):.3f}" == figure


def test_nothing_is_compared_without_bands_or_without_an_epsilon_to_compare_at() -> None:
    assert compare_bands(config(1), 100) == []
    assert compare_bands(config(4, privacy={"target_epsilon": None, "noise_multiplier": 1.0}), 100) == []
    assert band_advice([]) == ""
    # Of more bands than clients can be divided into, or than fraction_train leaves room for, nothing is said.
    assert [one.bands for one in compare_bands(config(4, fraction=0.25), 1000)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"privacy": {"adaptive_clipping": True}}, r"privacy\.adaptive_clipping = True: changes the size"),
        ({"server": {"optimizer": "fedadam"}}, r"server\.optimizer = 'fedadam': makes no sum of the rounds' means"),
        ({"fraction": 0.3}, r"server\.fraction_train = 0\.3: is more than one of the 4 groups.*0\.25 at most"),
        ({"rounds": 3}, r"run\.rounds = 3: gives some of the 4 groups of clients no turn"),
        ({"server": {"sampling": "fixed"}}, r"server\.sampling = 'fixed': has no accountant.*fraction_train = 0\.25"),
        (
            {"server": {"sampling": "fixed", "over_sampling": 2.0}, "fraction": 0.25},
            r"server\.over_sampling = 2\.0: asks more clients than those whose turn",
        ),
        (
            {"privacy": {"noise": "distributed"}, "server": {"secure_aggregation": True}, "fraction": 1.0},
            r"privacy\.noise = 'distributed': has each client draw its noise anew",
        ),
        ({"method": {"name": "fedsvd"}}, r"privacy\.bands = 4: .*changes its coordinates in every round"),
        ({"method": {"name": "rolora"}}, r"privacy\.bands = 4: .*sums other arrays in other rounds"),
        (
            {"method": {"name": "fed-sb", "init": "federated"}},
            r"privacy\.bands = 4: .*makes sums beside that of each round",
        ),
        ({"method": {"name": "flora"}}, r"privacy\.mode = 'client': needs a method whose aggregate is a mean"),
    ],
)
def test_what_it_cannot_do_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**sections)


def test_server_optimizers_that_sum_the_means_are_taken() -> None:
    for name in SERVER_OPTIMIZERS.names():
        kind = SERVER_OPTIMIZERS.get(name)
        if kind.linear or not kind.stateful:
            assert config(server={"optimizer": name}).privacy.groups == 4


def test_bands_divide_clients_where_the_server_adds_noise_alone() -> None:
    example = load_config(override("privacy", {"mode": "example", "target_epsilon": 8.0, "bands": 4}))
    assert (example.privacy.groups, example.privacy.group_rate(0.3)) == (1, 0.3)
    assert "privacy.bands is not used: privacy.mode is example" in unused_keys(example)


def test_more_groups_than_clients_are_refused() -> None:
    with pytest.raises(InputError, match=r"privacy\.bands = 4: divides 3 clients into more groups"):
        mechanism_of(config()).server_plan(config(privacy={"target_delta": 1e-3}), 3)


@pytest.mark.parametrize("bands", [3, 6, 7, 30])
def test_a_share_that_is_written_with_a_few_digits_is_a_whole_group(bands: int) -> None:
    chosen = config(bands, fraction=float(f"{1 / bands:g}"), server={"sampling": "fixed"})
    plan = mechanism_of(chosen).server_plan(chosen, 100)
    assert plan is not None
    assert (plan.sample_rate, plan.expected(100)) == (1.0, pytest.approx(100 / bands))
