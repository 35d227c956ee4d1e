"""Simulated links: seconds follow from bytes, rates and latency; the slowest client decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.communication.links import (
    PROFILES,
    Link,
    client_seconds,
    draw_link,
    link_seed,
    network_profile,
    round_network,
)
from fedlora.communication.meter import Row
from fedlora.config import load_config
from tests.configs import BASE

seeds = st.integers(0, 2**63 - 1)
clients = st.integers(0, 10**6)
profiles = st.sampled_from(sorted(PROFILES))


def row(client: int, direction: str, size: int) -> Row:
    return Row(1, client, direction, size, size, size)


@given(profiles, seeds, clients)
def test_a_link_depends_on_profile_seed_and_client_alone(name: str, seed: int, client: int) -> None:
    profile = PROFILES[name]
    link = draw_link(profile, seed, client)
    assert link == draw_link(profile, seed, client)
    assert min(link.download, link.upload, link.latency) > 0
    if profile.rate_sigma:
        assert link != draw_link(profile, seed, client + 1)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_links_are_log_normal_with_the_stated_medians_and_spread(name: str) -> None:
    profile = PROFILES[name]
    links = [draw_link(profile, 0, client) for client in range(4000)]
    for values, median, sigma in (
        ([8e-6 * link.download for link in links], profile.download_mbps, profile.rate_sigma),
        ([8e-6 * link.upload for link in links], profile.upload_mbps, profile.rate_sigma),
        ([1e3 * link.latency for link in links], profile.latency_ms, profile.latency_sigma),
    ):
        logs = np.log(values)
        assert np.median(logs) == pytest.approx(math.log(median), abs=0.06)
        assert logs.std() == pytest.approx(sigma, abs=0.06)


def test_a_client_takes_a_latency_and_its_bytes_at_its_rates() -> None:
    link = Link(download=1000.0, upload=100.0, latency=0.2)
    rows = [row(3, "initial", 500), row(3, "down", 2000), row(3, "up", 300)]
    assert client_seconds(rows, {3: link}) == {3: pytest.approx(0.5 + (0.1 + 2) + (0.1 + 3))}
    assert client_seconds(rows[1:2], {3: link}) == {3: pytest.approx(2.1)}


@given(profiles, seeds, st.dictionaries(st.integers(0, 50), st.integers(0, 10**8), min_size=1, max_size=8))
def test_a_round_lasts_as_long_as_its_slowest_client(name: str, seed: int, sizes: dict[int, int]) -> None:
    profile = PROFILES[name]
    rows = [row(client, way, size) for client, size in sizes.items() for way in ("down", "up")]
    alone = {c: round_network([r for r in rows if r.client == c], profile, seed)["seconds"] for c in sizes}
    together = round_network(rows, profile, seed)
    assert together["seconds"] == max(alone.values()) == alone[together["slowest"]]
    assert together["median_seconds"] == pytest.approx(np.median(list(alone.values())))
    # Nothing but the bytes and the link decides: more bytes are never quicker.
    more = round_network([*rows, row(next(iter(sizes)), "up", 10)], profile, seed)
    assert more["seconds"] >= together["seconds"]


def test_a_round_without_a_known_client_takes_no_time() -> None:
    assert round_network([row(-1, "up", 9)], PROFILES["lte"], 0) == {
        "seconds": 0.0,
        "median_seconds": 0.0,
        "slowest": None,
    }


def test_the_config_chooses_and_changes_a_profile() -> None:
    assert network_profile(load_config(BASE).network) is None
    config = load_config(BASE, {"network.profile": "lte", "network.upload_mbps": 3.5, "run.seed": 4})
    profile = network_profile(config.network)
    assert profile is not None
    assert (profile.upload_mbps, profile.download_mbps) == (3.5, PROFILES["lte"].download_mbps)
    assert link_seed(config) == 4
    assert link_seed(load_config(BASE, {"network.seed": 9})) == 9
