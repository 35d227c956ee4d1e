"""Faults that are planted into the mechanisms: an audit tells each, and a sound mechanism passes.

Seeds are fixed: each test has one outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.adapters import AdaptedModel
from fedlora.adapters.stacked import RowProducts
from fedlora.audit import audit
from fedlora.audit.report import Audit
from fedlora.errors import InputError
from fedlora.strategies.client_noise import ClientNoise, NoisyUpdates
from fedlora.training import cohort, dp
from tests import tiny
from tests.audit.conftest import Configs

CANARIES = 200
Patch = pytest.MonkeyPatch


def failed(found: Audit) -> set[str]:
    """Names of the checks that failed."""
    return {check.name for check in found.checks if not check.passed}


@pytest.mark.parametrize(("epsilon", "share"), [(3.0, 0.4), (8.0, 0.5)])
def test_a_sound_client_keeps_what_it_claims(configs: Configs, epsilon: float, share: float) -> None:
    found = audit(configs("example", epsilon), canaries=1000, inputs=False)
    assert found.faults == []
    assert 0.95 * epsilon < found.epsilon <= epsilon
    assert share * epsilon < found.lower_bound < epsilon
    assert found.unit == "one example of one client"


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_sound_server_keeps_what_it_claims(configs: Configs, share: float) -> None:
    found = audit(configs("client", server={"sampling": "poisson", "fraction_train": share}), inputs=False)
    assert found.faults == []
    assert 0.95 * 8 < found.epsilon <= 8
    assert 4 < found.lower_bound < 8
    assert found.unit == "one client with all its examples"


def test_a_sound_server_with_adaptive_clipping_keeps_what_it_claims(configs: Configs) -> None:
    privacy = {"mode": "client", "target_epsilon": 20.0, "target_delta": 1e-3, "adaptive_clipping": True}
    found = audit(configs("client", privacy=privacy), canaries=CANARIES, inputs=False)
    assert found.faults == []
    assert 0 < found.lower_bound < 20


@pytest.mark.parametrize("method", ["fedit", "fed-sb", "la-lora", "rolora", "ravan"])
def test_every_kind_of_method_can_be_audited(configs: Configs, method: str) -> None:
    """Those that train other factors in each step or round, too."""
    found = audit(configs("example", method={"name": method, "rank": 4}), canaries=100, inputs=False)
    assert found.faults == []
    assert found.lower_bound > 1


def half_the_noise(patch: Patch) -> None:
    draw = dp.StackedDPOptimizer._draw_noise
    patch.setattr(dp.StackedDPOptimizer, "_draw_noise", lambda self, size: draw(self, size) / 2)


def clipped_after_the_sum(patch: Patch) -> None:
    clip = dp.StackedDPOptimizer.clip_and_accumulate

    def clip_sums(self: dp.StackedDPOptimizer) -> None:
        norm, self.max_grad_norm = self.max_grad_norm, 1e9
        clip(self)
        self.max_grad_norm = norm
        sums = [p for p in self.params if p.summed_grad is not None]
        if sums:
            lengths = torch.stack([p.summed_grad.flatten(1).norm(dim=1) for p in sums]).norm(dim=0)
            factors = (norm / (lengths + 1e-6)).clamp(max=1)
            for p in sums:
                p.summed_grad = p.summed_grad * factors.reshape(-1, *(1,) * (p.dim() - 1))

    patch.setattr(dp.StackedDPOptimizer, "clip_and_accumulate", clip_sums)


def _of_head(sample: torch.Tensor | RowProducts) -> bool:
    return (sample.g.shape[-1] if isinstance(sample, RowProducts) else sample.shape[1]) == tiny.LABELS


def head_not_clipped(patch: Patch) -> None:
    norms = dp._norms
    patch.setattr(dp, "_norms", lambda sample: norms(sample) * (0 if _of_head(sample) else 1))


def head_without_noise(patch: Patch) -> None:
    add = dp.StackedDPOptimizer.add_noise

    def spare_head(self: dp.StackedDPOptimizer) -> None:
        add(self)
        for p in self.params:
            if p.shape[1] == tiny.LABELS:
                p.grad = torch.zeros_like(p) if p.summed_grad is None else p.summed_grad.clone()

    patch.setattr(dp.StackedDPOptimizer, "add_noise", spare_head)


def _noise_of(patch: Patch, **changed: int) -> None:
    make = cohort._Generators.__init__
    patch.setattr(
        cohort._Generators,
        "__init__",
        lambda self, seed, job, device: make(self, seed, replace(job, **changed), device),
    )


def noise_of_another_client(patch: Patch) -> None:
    _noise_of(patch, client=0)


def noise_of_the_first_round(patch: Patch) -> None:
    _noise_of(patch, server_round=1)


def noise_of_the_step_before(patch: Patch) -> None:
    draw = dp.StackedDPOptimizer._draw_noise

    def repeated(self: dp.StackedDPOptimizer, size: int) -> torch.Tensor:
        noise = draw(self, size)
        return noise[:1].expand_as(noise)

    patch.setattr(dp.StackedDPOptimizer, "_draw_noise", repeated)


def sampled_too_often(patch: Patch) -> None:
    draw = cohort.poisson_batches
    more = lambda rows, rate, *rest: draw(rows, min(1.0, 1.3 * rate), *rest)  # noqa: E731
    patch.setattr(cohort, "poisson_batches", more)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (half_the_noise, {"noise: lora_B", "noise: head"}),
        (clipped_after_the_sum, {"sensitivity"}),
        (head_not_clipped, {"sensitivity"}),
        (head_without_noise, {"noise: head"}),
        (noise_of_another_client, {"independence"}),
        (noise_of_the_first_round, {"independence"}),
        (noise_of_the_step_before, {"independence"}),
        (sampled_too_often, {"sampling"}),
    ],
)
def test_a_fault_of_clients_is_told(
    configs: Configs, monkeypatch: Patch, fault: Callable[[Patch], None], told: set[str]
) -> None:
    fault(monkeypatch)
    found = audit(configs("example", 3.0), canaries=CANARIES, inputs=False)
    assert told <= failed(found)
    assert found.faults


@pytest.mark.parametrize("fault", [half_the_noise, clipped_after_the_sum, head_not_clipped, head_without_noise])
def test_the_lower_bound_tells_faults_by_itself(
    configs: Configs, monkeypatch: Patch, fault: Callable[[Patch], None]
) -> None:
    fault(monkeypatch)
    found = audit(configs("example"), canaries=1000, inputs=False)
    assert found.lower_bound > found.epsilon


def mix_rows(patch: Patch) -> None:
    """Let the mean of the batch's logits leak into each of them."""
    outputs = AdaptedModel.outputs

    def mixed(self: AdaptedModel, batch: Any, task: Any) -> Any:
        found = outputs(self, batch, task)
        return found + found.mean(0, keepdim=True) if len(found) else found

    patch.setattr(AdaptedModel, "outputs", mixed)


def test_a_model_that_mixes_rows_is_told(configs: Configs, monkeypatch: Patch) -> None:
    """By the sums alone: the check of loaded models, which would refuse it first, is turned off."""
    mix_rows(monkeypatch)
    monkeypatch.setattr(cohort, "check_sound", lambda *_: None)
    found = audit(configs("example", 3.0), canaries=CANARIES, inputs=False)
    assert "sensitivity" in failed(found)


def test_a_model_that_mixes_rows_is_refused(configs: Configs, monkeypatch: Patch) -> None:
    found = "logits of a row depend on the batch"
    monkeypatch.setattr("fedlora.training.soundness._measure", lambda *_: found)
    monkeypatch.setattr("fedlora.clients.resources._last_model", [])
    from fedlora.clients.resources import forget_model

    forget_model()
    with pytest.raises(InputError, match=found):
        audit(configs("example", 3.0), canaries=40, inputs=False)
    forget_model()


def server_with_half_the_noise(patch: Patch) -> None:
    draw = ClientNoise._normal
    patch.setattr(ClientNoise, "_normal", lambda self, count: draw(self, count) / 2)


def server_that_repeats_its_noise(patch: Patch) -> None:
    draw = ClientNoise._normal

    def first(self: ClientNoise, count: int) -> torch.Tensor:
        releases, self.releases = self.releases, 0
        noise = draw(self, count)
        self.releases = releases
        return noise

    patch.setattr(ClientNoise, "_normal", first)


def server_that_clips_the_sum(patch: Patch) -> None:
    def mean(self: NoisyUpdates) -> Any:
        total = sum((move for move, _ in self.moves()), torch.zeros_like(self._from, dtype=torch.float64))
        total *= min(1.0, self._noise.norm / max(float(total.norm()), 1e-300))
        return self.moved(self._noise.release(total, 0, 0))

    patch.setattr(NoisyUpdates, "mean", mean)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (server_with_half_the_noise, {"noise: update"}),
        (server_that_repeats_its_noise, {"independence"}),
        (server_that_clips_the_sum, {"sensitivity"}),
    ],
)
def test_a_fault_of_the_server_is_told(
    configs: Configs, monkeypatch: Patch, fault: Callable[[Patch], None], told: set[str]
) -> None:
    fault(monkeypatch)
    found = audit(configs("client"), canaries=CANARIES, inputs=False)
    assert told <= failed(found)
    if fault is not server_that_repeats_its_noise:
        assert found.lower_bound > found.epsilon
