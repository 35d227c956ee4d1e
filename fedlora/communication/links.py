"""From bytes to seconds: what a round's messages would take on links of a kind.

Only the sending is counted, not the training. A message of b bytes takes half the link's round-trip time plus
8 b / rate. A client downloads, then uploads; clients send side by side, and the server's own link is never the narrow
one. So a round lasts as long as its slowest client. Handshakes, TCP's slow start and losses are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedlora.config import Config, NetworkSection

_STREAM = 0x4C


@dataclass(frozen=True)
class LinkProfile:
    """A kind of links: each client's rates and latency are drawn from log-normal distributions, independently.

    Attributes
    ----------
    title : str
    download_mbps, upload_mbps : float
        Medians in 10^6 bit/s.
    latency_ms : float
        Median round-trip time in milliseconds.
    rate_sigma, latency_sigma : float
        Standard deviations of the natural logarithms; 0 makes all links alike.
    source : str
        Where the numbers come from.
    """

    title: str
    download_mbps: float
    upload_mbps: float
    latency_ms: float
    rate_sigma: float
    latency_sigma: float
    source: str


_OOKLA = (
    "median download and latency: Speedtest Global Index, November 2021; the upload's median and the spread of the "
    "rates follow from its means of September 2020 (a log-normal's mean is its median times exp(sigma^2 / 2)); the "
    "spread of the latency is assumed"
)

PROFILES: dict[str, LinkProfile] = {
    "lte": LinkProfile("LTE", 29.0, 6.8, 29.0, 1.0, 0.5, f"mobile networks worldwide; {_OOKLA}"),
    "broadband": LinkProfile("home broadband", 58.0, 22.0, 10.0, 1.2, 0.5, f"fixed networks worldwide; {_OOKLA}"),
    "datacenter": LinkProfile(
        "data centre", 10_000.0, 10_000.0, 0.5, 0.0, 0.0, "10 Gbit/s Ethernet (IEEE 802.3ae), the same for all links"
    ),
}


@dataclass(frozen=True)
class Link:
    """One client's link: rates in bytes a second, latency (round trip) in seconds."""

    download: float
    upload: float
    latency: float

    def seconds(self, size: float, *, up: bool) -> float:
        """Return how long a message of ``size`` bytes takes."""
        return self.latency / 2 + size / (self.upload if up else self.download)


class MessageRow(Protocol):
    """What is read of a line of communication.csv."""

    @property
    def client(self) -> int:
        """Client number."""

    @property
    def direction(self) -> str:
        """Return initial, down or up, or one of the two of an evaluation."""

    @property
    def message_bytes(self) -> int:
        """Bytes of the whole message."""


def network_profile(section: NetworkSection) -> LinkProfile | None:
    """Return the profile of ``[network]`` with the medians that the config gives; None where none is chosen."""
    if section.profile == "none":
        return None
    base = PROFILES[section.profile]
    own = {
        name: value
        for name in ("download_mbps", "upload_mbps", "latency_ms")
        if (value := getattr(section, name)) is not None
    }
    return LinkProfile(**{**vars(base), **own})


def link_seed(config: Config) -> int:
    """Return what the clients' links are drawn by."""
    return config.run.seed if config.network.seed is None else config.network.seed


def draw_link(profile: LinkProfile, seed: int, client: int) -> Link:
    """Draw a client's link; a function of the profile, the seed and the client alone."""
    down, up, latency = np.random.default_rng([seed, client, _STREAM]).standard_normal(3)
    byte_rate = 1e6 / 8
    return Link(
        profile.download_mbps * byte_rate * float(np.exp(profile.rate_sigma * down)),
        profile.upload_mbps * byte_rate * float(np.exp(profile.rate_sigma * up)),
        profile.latency_ms / 1e3 * float(np.exp(profile.latency_sigma * latency)),
    )


def client_seconds(rows: Iterable[MessageRow], links: Mapping[int, Link]) -> dict[int, float]:
    """Return how long each client of a round sends and receives.

    Parameters
    ----------
    rows : iterable of MessageRow
        The round's messages. The frozen arrays (direction initial) are part of the first message down: they take time
        for their bytes, and no latency of their own.
    links : mapping of int to Link
        By client.

    Returns
    -------
    dict of int to float
        Seconds by client, in the order of the rows. A client that answered nothing has its download alone.
    """
    seconds: dict[int, float] = defaultdict(float)
    for row in rows:
        link = links[row.client]
        if row.direction == "initial":
            seconds[row.client] += row.message_bytes / link.download
        else:
            seconds[row.client] += link.seconds(row.message_bytes, up=row.direction.endswith("up"))
    return dict(seconds)


def round_network(rows: Iterable[MessageRow], profile: LinkProfile, seed: int) -> dict[str, Any]:
    """Return what a round's messages take on links of a profile.

    Returns
    -------
    dict
        ``seconds`` of the slowest client, which is how long the round lasts, ``median_seconds`` over its clients, and
        ``slowest``, the client.
    """
    rows = [row for row in rows if row.client >= 0]  # a node that nobody asked has no link
    seconds = client_seconds(rows, {client: draw_link(profile, seed, client) for client in {r.client for r in rows}})
    if not seconds:
        return {"seconds": 0.0, "median_seconds": 0.0, "slowest": None}
    slowest = max(seconds, key=lambda client: seconds[client])
    return {"seconds": seconds[slowest], "median_seconds": float(np.median(list(seconds.values()))), "slowest": slowest}
