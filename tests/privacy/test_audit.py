"""An audit of what the client really releases: a server that knows all but one example guesses whether it was there.

A canary is an example whose gradient is longer than the clipping norm. Clients with it and without it train by the
ClientApp's own ``train``, from arrays that the server chose and for as many steps as it plans for. The server knows the
model, the code and every other example; it projects each update onto the canary's gradient and guesses by a threshold
that is set in advance. How often it is wrong bounds epsilon from below: by Clopper and Pearson at ``CONFIDENCE`` each
for false alarms and misses, then as a Gaussian mechanism (Nasr et al. 2023, arXiv 2302.07956).

An attack on a sound client proves too much with probability of at most 2 (1 - CONFIDENCE) = 0.002, for its two bounds.
An audit takes the best of two attacks, or of three over two rounds, so that it fails with at most 0.004 or 0.006. Seeds
are fixed: each test has one outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from opacus.accountants.analysis import gdp
from scipy.stats import beta, chi2, norm

from fedlora.adapters.stacked import RowProducts
from fedlora.clients import client_app, half, participant
from fedlora.communication.wire import decode, encode
from fedlora.config import Config
from fedlora.training import cohort, dp
from tests import tiny
from tests.messages import FIRST_NODE, train_message

CONFIDENCE = 0.999
COHORT = 500
CLIP = 0.05
"""Far below the norms of the tiny model's gradients, of the head's alone too."""
ORDINARY, CANARY = 0, 1
Fault = Callable[[pytest.MonkeyPatch], None]


@dataclass
class Releases:
    """What clients released in each round, [rounds, clients, numbers], as sums in units of C, and what they claim."""

    noisy: np.ndarray
    exact: np.ndarray
    noise_multiplier: float
    epsilon: float
    delta: float


class Federation:
    """Clients that hold an ordinary example (the first ``count``), or beside it the canary (``count`` more)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, rounds: int = 1, **privacy: float) -> None:
        self.count, self.rounds = count, rounds
        self.config = tiny.settings(
            run={"rounds": rounds, "seed": 11},
            method={"target_modules": ["0.attention.self.query"]},
            data={"partition": {"clients": 2 * count}},
            client={"optimizer": "sgd", "batch_size": 2, "local_steps": 1},
            privacy={"mode": "example", "max_grad_norm": CLIP, **privacy},
        )
        self.adapted = tiny.adapted_model("bert", self.config)
        rows = [np.array([ORDINARY])] * count + [np.array([ORDINARY, CANARY])] * count
        data = SimpleNamespace(
            train=tiny.table("bert", 2, seed=1),
            partition=rows,
            drawn_from=lambda client, _: len(rows[client]),
            units_of=lambda *_: None,
        )
        monkeypatch.setattr(half, "client_model", lambda config: self.adapted)
        for module in (client_app, participant):
            monkeypatch.setattr(module, "client_data", lambda config: data)
        self.states = [RecordDict() for _ in rows]

    def releases(self) -> Releases:
        """Train every client in every round, with noise and, to know what the noise was added to, without."""
        noisy, exact = [], []
        without = self.config.privacy.model_copy(update={"target_epsilon": None, "noise_multiplier": 0.0})
        bare = self.config.model_copy(update={"privacy": without})
        for server_round in range(1, self.rounds + 1):
            tiny.start(self.adapted, seed=server_round)  # the server chooses what each round starts from
            arrays = self.adapted.arrays(tiny.trained_names(self.adapted, self.config))
            one, other = self.train(bare, server_round, arrays, [0, self.count], None)[0]
            exact.append(np.stack([one] * self.count + [other] * self.count))
            sums, metrics = [], None
            for first in range(0, 2 * self.count, COHORT):
                members = list(range(first, min(first + COHORT, 2 * self.count)))
                found, metrics = self.train(self.config, server_round, arrays, members, self.states)
                sums.append(found)
            noisy.append(np.concatenate(sums))
        return Releases(
            np.array(noisy), np.array(exact), metrics["noise-multiplier"], metrics["epsilon"], metrics["delta"]
        )

    def train(
        self, config: Config, server_round: int, arrays: Any, members: list[int], states: list[RecordDict] | None
    ) -> tuple[np.ndarray, Any]:
        """Return the sums that clients' updates stand for, [clients, numbers] in units of C, and the last's metrics."""
        settings = {"server-round": server_round, "learning-rate": 1.0}
        text = config.to_toml()
        sent = encode(arrays)
        messages, contexts = [], []
        for k in members:
            content = RecordDict({"arrays": sent, "config": ConfigRecord(settings)})
            messages.append(train_message(FIRST_NODE + k, content, server_round))
            node = {"partition-id": k, "simulated": True}
            state = states[k] if states else RecordDict()
            contexts.append(Context(1, FIRST_NODE + k, node, state, {"config": text}))
        sums = []
        for k, reply in zip(members, client_app.train(messages, contexts), strict=True):
            assert not reply.has_error(), reply.error
            trained: Any = decode(reply.content["arrays"])
            expected_batch_size = 1 if k < self.count else 2
            change = torch.cat([(arrays[name] - trained[name]).flatten() for name in arrays])
            sums.append(change.double().numpy() * expected_batch_size / CLIP)
        metrics: Any = reply.content["metrics"]
        return np.array(sums), metrics


def lower_bound(scores_without: np.ndarray, scores_with: np.ndarray, delta: float) -> float:
    """Epsilon that the guesses prove, where scores are distances from no canary (0) towards the canary (1)."""
    alarms, misses = int((scores_without > 0.5).sum()), int((scores_with <= 0.5).sum())
    bounds = [
        beta.ppf(CONFIDENCE, wrong + 1, len(of) - wrong)
        for wrong, of in ((alarms, scores_without), (misses, scores_with))
    ]
    mu = float(-norm.ppf(bounds[0]) - norm.ppf(bounds[1]))
    if mu <= 0 or gdp.delta_eps_mu(eps=0, mu=mu) <= delta:
        return 0.0
    return float(gdp.eps_from_mu(mu=mu, delta=delta))


def scores(noisy: np.ndarray, without: np.ndarray, canary: np.ndarray) -> np.ndarray:
    """Projections onto the canary's gradient: 0 without it and 1 with it, but for the noise."""
    return (noisy - without) @ canary / (canary @ canary)


def audit(found: Releases) -> float:
    """Return the most that any of the server's attacks proves about epsilon.

    It adds up what the rounds' updates say of the canary; it takes the difference of two rounds, and that of two
    clients, in which noise that is used twice would fall out.
    """
    count = len(found.noisy[0]) // 2
    without, canary = found.exact[:, 0], found.exact[:, count] - found.exact[:, 0]
    attacks = [(found.noisy, without, canary)]
    if len(found.noisy) == 2:
        attacks.append(tuple(x[:1] - x[1:] for x in (found.noisy, without, canary)))  # type: ignore[arg-type]
    # The update of a client that the server knows whole (the next one without the canary) is taken away.
    other = np.roll(found.noisy[:, :count], 1, axis=1)
    attacks.append((found.noisy - np.concatenate([other, other], 1), np.zeros_like(without), canary))
    bounds = []
    for noisy, base, direction in attacks:
        flat = scores(np.concatenate(list(noisy), 1), base.reshape(-1), direction.reshape(-1))
        bounds.append(lower_bound(flat[:count], flat[count:], found.delta))
    return max(bounds)


def noise_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = dp.StackedDPOptimizer._draw_noise
    monkeypatch.setattr(dp.StackedDPOptimizer, "_draw_noise", lambda self, size: draw(self, size) / 2)


def clipping_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = dp.StackedDPOptimizer.clip_and_accumulate

    def unclipped(self: dp.StackedDPOptimizer) -> None:
        norm_, self.max_grad_norm = self.max_grad_norm, 1e9
        clip(self)
        self.max_grad_norm = norm_

    monkeypatch.setattr(dp.StackedDPOptimizer, "clip_and_accumulate", unclipped)


def head_left_out_of_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = dp._norms

    def of_adapters(sample: torch.Tensor | RowProducts) -> torch.Tensor:
        outputs = sample.g.shape[-1] if isinstance(sample, RowProducts) else sample.shape[1]
        return norms(sample) * (0 if outputs == tiny.LABELS and not _is_adapter(sample) else 1)

    monkeypatch.setattr(dp, "_norms", of_adapters)


def _is_adapter(sample: torch.Tensor | RowProducts) -> bool:
    """Tell LoRA's A [rank, 32], whose rank is the number of labels here, from the head [labels, 32] by its rows."""
    return isinstance(sample, RowProducts) and sample.g.dim() == 3 and sample.g.shape[1] > 1


def noise_of_a_round_again(monkeypatch: pytest.MonkeyPatch) -> None:
    make = cohort._Generators.__init__
    again = lambda self, seed, job, device: make(self, seed, replace(job, server_round=1), device)  # noqa: E731
    monkeypatch.setattr(cohort._Generators, "__init__", again)


def noise_of_another_client(monkeypatch: pytest.MonkeyPatch) -> None:
    make = cohort._Generators.__init__
    same = lambda self, seed, job, device: make(self, seed, replace(job, client=0), device)  # noqa: E731
    monkeypatch.setattr(cohort._Generators, "__init__", same)


@pytest.mark.parametrize(("epsilon", "count", "proved"), [(1.0, 3000, 0.1), (8.0, 700, 4.5)])
def test_what_is_released_proves_less_than_what_is_claimed(monkeypatch, epsilon, count, proved):
    """And not much less, else the audit could not fail."""
    found = Federation(monkeypatch, count, target_epsilon=epsilon).releases()
    assert epsilon * 0.99 < found.epsilon <= epsilon
    # The canary counts with all that clipping leaves to an example.
    assert np.linalg.norm(found.exact[0, count] - found.exact[0, 0]) == pytest.approx(1, abs=1e-3)
    assert proved < audit(found) < found.epsilon


def test_two_rounds_prove_less_than_what_is_claimed(monkeypatch):
    found = Federation(monkeypatch, 500, rounds=2, target_epsilon=8.0).releases()
    assert 7.9 < found.epsilon <= 8
    assert 3 < audit(found) < found.epsilon


@pytest.mark.parametrize(
    ("fault", "rounds"),
    [
        (noise_halved, 1),
        (clipping_left_out, 1),
        (head_left_out_of_the_norm, 1),
        (noise_of_a_round_again, 2),
        (noise_of_another_client, 1),
    ],
)
def test_the_audit_catches(monkeypatch, fault: Fault, rounds):
    federation = Federation(monkeypatch, 400, rounds, target_epsilon=8.0)
    fault(monkeypatch)
    found = federation.releases()
    assert found.epsilon <= 8
    assert audit(found) > found.epsilon


def test_the_audit_catches_half_the_noise_at_epsilon_1(monkeypatch):
    federation = Federation(monkeypatch, 3000, target_epsilon=1.0)
    noise_halved(monkeypatch)
    found = federation.releases()
    assert audit(found) > found.epsilon


def noise_is_that_of_the_plan(found: Releases) -> bool:
    """Test the sum of squares of the noise, in units of sigma C; a sound client fails with probability 1e-6."""
    noise = (found.noisy - found.exact) / found.noise_multiplier
    count = noise.shape[1] // 2
    low, high = chi2.ppf([2.5e-7, 1 - 2.5e-7], noise[:, :count].size)
    return all(bool(low < np.square(part).sum() < high) for part in (noise[:, :count], noise[:, count:]))


def test_the_noise_is_divided_by_the_expected_batch_size(monkeypatch):
    """Epsilon does not depend on a constant divisor; a wrong one makes steps too long or too short."""
    assert noise_is_that_of_the_plan(Federation(monkeypatch, 20, target_epsilon=8.0).releases())
    for wrong in (lambda self: [1.0] * len(self.expected_batch_sizes), lambda self: [2 * e for e in self.right]):
        with monkeypatch.context() as planted:
            scale = dp.StackedDPOptimizer.scale_grad

            def scaled(self: Any, wrong: Any = wrong, scale: Any = scale) -> None:
                self.right = list(self.expected_batch_sizes)
                if any(self.noise_multipliers):
                    self.expected_batch_sizes = wrong(self)
                scale(self)

            planted.setattr(dp.StackedDPOptimizer, "scale_grad", scaled)
            assert not noise_is_that_of_the_plan(Federation(monkeypatch, 20, target_epsilon=8.0).releases())
