"""Noise that clients add under secure sums: the central mechanism's on the sum, whoever drops out, and its epsilon."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant

from fedlora.errors import InputError
from fedlora.methods import get_method, methods
from fedlora.results.privacy_spent import explain_privacy
from tests.llama_runs import LlamaRuns, adapter, lines, payload, table
from tests.secure_clients import Crowd, secure_config

DELTA = 1e-3
SIZE = 40_000


def privacy(noise: str = "distributed", **given: Any) -> dict[str, Any]:
    return {"mode": "client", "target_delta": DELTA, "noise": noise, **given}


def crowd(clients: int, noise: str, gone: Any = None, sent: Any = None, sigma: float = 1.5, **server: Any) -> Crowd:
    vectors = sent or {client: np.zeros(SIZE) for client in range(clients)}
    given = privacy(noise, noise_multiplier=sigma, clipping_norm=2.0)
    return Crowd(secure_config(given, **server), vectors, gone)


def deviation(found: torch.Tensor | None) -> float:
    assert found is not None
    return float(found.double().std())


@pytest.mark.parametrize(
    ("noise", "threshold", "gone", "expected"),
    [
        # Of ten clients so many are promised, answer, and share in the noise.
        ("distributed", 1.0, {}, 1.0),
        ("distributed", 0.6, {}, math.sqrt(10 / 6)),
        ("distributed", 0.6, {"sum": [1, 2], "shares": [3], "keys": [4]}, 1.0),
        ("distributed", 0.8, {"sum": [7], "unmask": [5]}, math.sqrt(9 / 8)),
        ("local", 0.6, {}, math.sqrt(10)),
        ("local", 0.6, {"sum": [1, 2]}, math.sqrt(8)),
    ],
)
def test_the_sum_has_the_central_noise_and_never_less(
    noise: str, threshold: float, gone: dict[str, list[int]], expected: float
) -> None:
    found = crowd(10, noise, gone, reconstruction_threshold=threshold)
    mean = found.sum({client: float(client) for client in range(10)})
    answered = 10 - sum(len(clients) for stage, clients in gone.items() if stage != "unmask")
    # z C on the sum; the mean is of those that answered, whatever their weights.
    assert deviation(mean) * answered == pytest.approx(expected * 1.5 * 2.0, rel=4 / math.sqrt(2 * SIZE))
    stated = found.noise.row()["noise_multiplier"]
    assert stated == pytest.approx(1.5 * (expected if noise == "distributed" else 1.0))
    assert stated >= 1.5 * (1 - 1e-9)


def test_clients_clip_and_count_alike() -> None:
    rng = np.random.default_rng(3)
    sent = {client: rng.standard_normal(50) * 10.0**client for client in range(-3, 4)}
    sent = {place: vector for place, vector in enumerate(sent.values())}
    found = crowd(7, "distributed", sent=sent, sigma=0.0).sum({client: 1.0 + 100 * client for client in sent})
    expected = sum(vector * min(1.0, 2.0 / float(np.linalg.norm(vector))) for vector in sent.values()) / 7
    assert found is not None
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_rounds_and_clients_have_noise_of_their_own() -> None:
    found = crowd(4, "distributed")
    first, second = (found.sum(dict.fromkeys(range(4), 1.0), group) for group in ("1", "2"))
    assert first is not None
    assert second is not None
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 4 / math.sqrt(SIZE)
    again = crowd(4, "distributed").sum(dict.fromkeys(range(4), 1.0), "1")
    assert again is not None
    assert torch.equal(first, again)
    # Equal draws of all clients would add up to twice the deviation.
    assert deviation(first) * 4 == pytest.approx(3.0 * math.sqrt(4 / 3), rel=4 / math.sqrt(2 * SIZE))
    # On a real node the same message gets other noise each time.
    real = crowd(4, "distributed")
    for context in real.contexts.values():
        context.node_config.pop("simulated")
    other = real.sum(dict.fromkeys(range(4), 1.0), "1")
    assert other is not None
    assert not torch.equal(first, other)


def test_what_is_spent_is_what_happened() -> None:
    found = crowd(10, "distributed", sigma=3.0)
    everyone = dict.fromkeys(range(10), 1.0)
    found.sum(everyone, "1")
    found.gone = {"sum": [0, 1, 2]}
    found.sum(everyone, "2")
    found.gone = {"sum": [0, 1, 2, 3, 4]}
    assert found.sum(everyone, "3") is None  # nothing was told of that round
    assert found.noise.releases == 2
    theirs = RdpAccountant()
    for answered in (10, 7):
        theirs.compose(GaussianDpEvent(3.0 * math.sqrt(answered / 6)))
    row = found.noise.row()
    assert row["epsilon"] == pytest.approx(theirs.get_epsilon(DELTA), rel=0.02)
    assert row["noise_multiplier"] == pytest.approx(3.0 * math.sqrt(7 / 6))
    again = crowd(10, "distributed", sigma=3.0).noise
    again.load_state_dict(found.noise.state_dict())
    assert again.row() == row


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"server": {"secure_aggregation": False}}, r"privacy\.noise = 'distributed': is hidden in a sum; set server"),
        ({"server": {"sampling": "poisson", "fraction_train": 0.5}}, r"server\.fraction_train = 0\.5: with privacy"),
        ({"privacy": {"accountant": "prv"}}, r"privacy\.accountant = 'prv': has no bound for sums of discrete noise"),
        ({"privacy": {"adaptive_clipping": True}}, r"privacy\.adaptive_clipping = True: needs a noisy count"),
        ({"privacy": {"noise": "central"}}, r"privacy\.mode = 'client': needs single clients' updates.*distributed"),
        ({"server": {"aggregator": "median"}}, r"server\.aggregator = 'median'"),
        ({"method": {"name": "flora"}}, r"privacy\.mode = 'client': needs a method whose aggregate is a mean"),
    ],
)
def test_what_the_accounting_does_not_cover_is_refused(runs: LlamaRuns, changed: dict[str, Any], message: str) -> None:
    sections = {"privacy": privacy(noise_multiplier=2.0), "server": {"secure_aggregation": True}}
    for section, values in changed.items():
        sections[section] = {**sections.get(section, {}), **values}
    with pytest.raises(InputError, match=message):
        runs.config(**sections)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


MEANS = [name for name, method in sorted(methods().items()) if not method.reads_single_updates]
SERVER: dict[str, Any] = {"secure_aggregation": True, "reconstruction_threshold": 1.0}


@pytest.mark.parametrize("name", MEANS)
def test_every_method_that_is_a_mean_runs_under_it(runs: LlamaRuns, name: str) -> None:
    sections: dict[str, Any] = {"method": {"name": name, "rank": 2}, "run": {"rounds": 2}, "server": SERVER}
    sections["privacy"] = privacy(target_epsilon=8.0, clipping_norm=0.5)
    if name == "peft":
        sections["method"] = {"name": name, "peft_type": "LORA"}
    result = runs.run(**sections)
    epsilon = [float(row["epsilon"]) for row in table(result, "privacy.csv")]
    releases = len(get_method(name).exchanges(runs.config(**sections), 1)) * 2
    assert len(epsilon) == releases
    assert epsilon == sorted(epsilon)
    assert 7.9 < epsilon[-1] <= 8
    planned = runs.forecast(**sections)
    assert (payload(result, "up"), payload(result, "down")) == (planned.uplink_bytes, planned.downlink_bytes)
    assert all(line["counted"] and line["train_loss"] is None for line in lines(result))


def test_its_epsilon_is_explained_and_computed_again(runs: LlamaRuns) -> None:
    result = runs.run(privacy=privacy(target_epsilon=8.0), server={"secure_aggregation": True})
    spent = explain_privacy(Path(result.folder))
    assert spent.neighbours == "one client with all its examples, and zeros in place of its update"
    assert "its share of a discrete Gaussian noise" in spent.mechanism
    assert spent.epsilon == spent.recorded
    assert abs(spent.difference) < 0.02
    # All four answered, and three would have been enough.
    assert spent.recorded < 8.0
    assert not any("losses" in text for text in spent.not_covered)


def test_a_resumed_run_has_the_same_bits_and_epsilon(runs: LlamaRuns) -> None:
    sections: dict[str, Any] = {"privacy": privacy(noise_multiplier=0.3), "server": {"secure_aggregation": True}}
    whole, resumed = runs.run(**sections), runs.run(stop=2, **sections)
    a, b = adapter(whole), adapter(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert table(whole, "privacy.csv") == table(resumed, "privacy.csv")
