"""FedProx's term: its gradient is mu (w - w_start), added after clipping and noise, for each client of a cohort."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config, load_config, unused_keys
from fedlora.training import cohort, train_cohort
from fedlora.training.local_terms import add_local_terms
from tests import tiny
from tests.configs import override

SIZES = [5, 3, 4]


def trained(mu: float, plans: Any = None, clients: list[int] | None = None, /, **client: Any) -> list[Arrays]:
    """Train clients of a tiny model, in one pass; each starts from the same arrays."""
    adapted, config, start = model(mu, **client)
    jobs = tiny.jobs_of([start] * len(SIZES), tiny.split(SIZES), plans, learning_rate=0.3)
    chosen = [jobs[k] for k in (clients or range(len(SIZES)))]
    return [result.arrays for result in train_cohort(adapted, tiny.table("bert", sum(SIZES)), chosen, config)]


def model(mu: float, **client: Any) -> tuple[AdaptedModel, Config, Arrays]:
    section = {"optimizer": "sgd", "batch_size": 8, "local_steps": 4, "proximal_mu": mu, **client}
    if "local_epochs" in client:
        del section["local_steps"]
    config = tiny.settings("bert", client=section)
    adapted = tiny.adapted_model("bert", config, torch.float64)
    return adapted, config, adapted.arrays(tiny.trained_names(adapted, config))


@settings(max_examples=20)
@given(st.integers(1, 4), st.floats(0.01, 3), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([1e-12, 1e-5]))
def test_steps_on_quadratics_are_those_of_the_sum(clients: int, mu: float, steps: int, seed: int, close: float) -> None:
    """f(w) = h/2 (w - b)^2 + mu/2 (w - s)^2, each client with its own h, b and s."""
    rng = np.random.default_rng(seed)
    h, b, s = rng.uniform(0.1, 1, (clients, 3)), rng.normal(size=(clients, 3)), rng.normal(size=(clients, 3))
    dtype = torch.float64 if close < 1e-9 else torch.float32
    w = torch.nn.Parameter(torch.tensor(s, dtype=dtype))
    optimizer = torch.optim.SGD([w], lr=0.1)
    add_local_terms(optimizer, [w.detach().clone()], mu)
    expected = s.copy()
    for _ in range(steps):
        (0.5 * torch.tensor(h, dtype=dtype) * (w - torch.tensor(b, dtype=dtype)) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected -= 0.1 * (h * (expected - b) + mu * (expected - s))
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=0, atol=close * 10)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_local_training_is_plain_sgd_on_the_loss_and_the_term(clip: float | None) -> None:
    """On whole batches, with the loss's gradient clipped before the term is added."""
    mu = 0.7
    options: dict[str, Any] = {} if clip is None else {"max_grad_norm": clip}
    adapted, _, start = model(mu)
    examples = tiny.table("bert", sum(SIZES))
    for k, (rows, got) in enumerate(zip(tiny.split(SIZES), trained(mu, **options), strict=True)):
        adapted.set_clients([start])
        for _ in range(4):
            batch = examples.batch(rows)
            adapted.layout.set_rows([len(rows)])
            loss = examples.task.loss(adapted.logits(batch), batch["labels"]).mean()
            gradients = torch.autograd.grad(loss, adapted.parameters())
            norm = float(torch.cat([g.flatten() for g in gradients]).norm())
            scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
            with torch.no_grad():
                for name, p, g in zip(adapted.trained, adapted.parameters(), gradients, strict=True):
                    p -= 0.3 * (scale * g + mu * (p - start[name]))
        assert tiny.difference(got, adapted.arrays(adapted.trained)) < 1e-12, k
        assert tiny.difference(got, start) > 1e-3


def test_under_dp_the_gradient_is_the_noised_one_and_the_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs have the same weights in the second step, since the term is 0 in the first one."""
    mu, plans = 0.7, [tiny.plan(1.1, 0.1, 0.5, 2.0)] * len(SIZES)
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def noted(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        add_local_terms(optimizer, *rest)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *_: seen.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        )

    monkeypatch.setattr(cohort, "add_local_terms", noted)
    trained(0.0, plans, local_steps=2)
    trained(mu, plans, local_steps=2)
    first, plain, again, proximal = seen
    for before, (start, g), (w, h), (same, k) in zip(first, again, plain, proximal, strict=True):
        assert torch.equal(before[1], g)
        assert torch.equal(w, same)
        torch.testing.assert_close(k, h + mu * (w - start), rtol=0, atol=1e-14)
        assert not torch.equal(k, h)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_cohort_is_its_clients_alone(optimizer: str, private: bool) -> None:
    plans = [tiny.plan(s, 0.1, 0.6, 2.0) for s in (0.5, 1.0, 2.0)] if private else None
    options: dict[str, Any] = {"optimizer": optimizer, "local_epochs": 2, "batch_size": 2}
    together = trained(0.7, plans, **options)
    for k, arrays in enumerate(together):
        (alone,) = trained(0.7, plans, [k], **options)
        assert tiny.difference(arrays, alone) < 1e-10
    without = trained(0.0, plans, **options)
    assert all(tiny.difference(a, b) > 1e-5 for a, b in zip(together, without, strict=True))


def test_a_single_step_has_no_use_for_it() -> None:
    given = override("client", {"proximal_mu": 0.1, "local_steps": 1})
    assert [note.split()[0] for note in unused_keys(load_config(given))] == ["client.proximal_mu"]
