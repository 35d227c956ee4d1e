"""DP-SGD: stock Opacus for a client alone, the right noise for each client of a cohort, and guards."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from fedlora.adapters import AdaptedModel, RowLayout, stacked
from fedlora.adapters.stacked import RowProducts, ghost_norms_pay
from fedlora.config import Config
from fedlora.errors import GuardError
from fedlora.training import ClientJob, cohort, train_cohort
from fedlora.training import dp as dp_module
from fedlora.training.dp import NOISE_STEPS, StackedDPOptimizer, choose_ghost_norms
from tests import tiny


class StockLoRA(nn.Module):
    """LoRA from three plain linear layers."""

    def __init__(self, base: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.a = nn.Linear(a.shape[1], a.shape[0], bias=False)
        self.b = nn.Linear(b.shape[1], b.shape[0], bias=False)
        self.a.weight.data, self.b.weight.data = a.clone(), b.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * self.b(self.a(x))


def stock_model(
    kind: str, adapted: AdaptedModel, start: dict[str, torch.Tensor]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Make the same model without anything of fedlora in it, and name its trainable parameters as fedlora does."""
    dtype = next(adapted.model.parameters()).dtype
    model = tiny.base_model(kind, dtype)
    parameters: dict[str, nn.Parameter] = {}
    values = {**adapted.arrays(), **start}
    for path, adapter in adapted.adapters.items():
        a, b = values[f"{path}.lora_A"], values[f"{path}.lora_B"]
        layer = StockLoRA(model.get_submodule(path), a, b, adapter.scaling).to(dtype)
        model.set_submodule(path, layer)
        parameters |= {f"{path}.lora_A": layer.a.weight, f"{path}.lora_B": layer.b.weight}
    for path in adapted.head:
        linear: Any = model.get_submodule(path)
        linear.weight.data, linear.bias.data = start[f"{path}.weight"].clone(), start[f"{path}.bias"].clone()
        parameters |= {f"{path}.weight": linear.weight, f"{path}.bias": linear.bias}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in start)
    return model.train(), {name: parameters[name] for name in start}


@pytest.mark.parametrize("method", ["fedit", "ffa-lora"])
@pytest.mark.parametrize("kind", ["bert", "mean", "llama"])
def test_a_client_alone_equals_stock_opacus(kind, method):
    """GradSampleModule and DPOptimizer on plain linear layers, same batches, every row clipped, fp32."""
    config = tiny.settings(
        kind, method={"name": method}, client={"optimizer": "sgd", "local_steps": 4, "momentum": 0.5}
    )
    adapted = tiny.adapted_model(kind, config)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    examples = tiny.table(kind, 10)
    plan = tiny.plan(0.0, 0.05, 0.6, 6.0)
    job = tiny.jobs_of([start], [np.arange(10)], [plan], learning_rate=1.0)[0]
    result = train_cohort(adapted, examples, [job], config)[0]

    model, parameters = stock_model(kind, adapted, start)
    wrapped = GradSampleModule(model, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=1.0, momentum=0.5),
        noise_multiplier=0.0,
        max_grad_norm=plan.max_grad_norm,
        expected_batch_size=plan.expected_batch_size,
    )
    sampling = cohort._Generators(config.run.seed, job, torch.device("cpu")).sampling
    losses = []
    for rows in cohort.poisson_batches(job.rows, plan.sample_rate, 4, sampling):
        assert len(rows) > 0
        batch = examples.batch(rows)
        optimizer.zero_grad()
        output = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = examples.task.loss(output.logits, batch["labels"])
        loss.mean().backward()
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters.values()]).norm(dim=0)
        assert (norms > plan.max_grad_norm).all()
        optimizer.step()
        losses += loss.tolist()
    moved = {name: parameter.detach() for name, parameter in parameters.items()}
    assert tiny.difference(moved, start) > 0.01
    assert tiny.difference(moved, result.arrays) < 1e-6
    assert result.loss == tiny.same_loss(np.mean(losses), 1e-5)


@pytest.mark.parametrize("sizes", [[5], [4, 4, 4], [3, 7, 0, 2]])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_ghost_norms_train_what_per_example_gradients_train(kind, sizes, monkeypatch):
    config = tiny.settings(kind, client={"local_steps": 3, "physical_batch_size": 2})
    adapted = tiny.adapted_model(kind, config, torch.float64)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    examples = tiny.table(kind, 13)
    plans = [tiny.plan(0.7, 0.05, 0.6, 3.0)] * len(sizes)
    jobs = tiny.jobs_of([start] * len(sizes), tiny.split([max(1, n) for n in sizes]), plans, learning_rate=0.1)

    def run(ghost: bool) -> list[cohort.ClientResult]:
        monkeypatch.setattr(stacked, "ghost_norms_pay", lambda *_: ghost)
        results = train_cohort(adapted, examples, jobs, config)
        layers = adapted.stacked_layers()
        assert {layers[name].ghost for name in adapted.trained if name in layers} == {ghost}
        return results

    for explicit, ghost in zip(run(False), run(True), strict=True):
        assert tiny.difference(explicit.arrays, start) > 1e-3
        assert tiny.difference(explicit.arrays, ghost.arrays) < 1e-10


@pytest.mark.parametrize("ghost", [False, True])
def test_per_example_gradients_keep_no_graph(ghost, monkeypatch):
    """What they are made of came through the graph, whose activations would live as long as they do."""
    monkeypatch.setattr(stacked, "ghost_norms_pay", lambda *_: ghost)
    seen: list[torch.Tensor] = []
    clip = StackedDPOptimizer.clip_and_accumulate

    def noted(self: Any) -> None:
        for sample in (p.grad_sample for p in self.params if p.grad_sample is not None):
            seen.extend((sample.g, sample.x) if isinstance(sample, RowProducts) else (sample,))
        clip(self)

    monkeypatch.setattr(StackedDPOptimizer, "clip_and_accumulate", noted)
    config = tiny.settings("llama", client={"local_steps": 1})
    adapted = tiny.adapted_model("llama", config)
    jobs = tiny.jobs_of(
        [adapted.arrays(tiny.trained_names(adapted, config))], [np.arange(4)], [tiny.plan(1.0, 1.0, 1.0)]
    )
    train_cohort(adapted, tiny.table("llama", 4), jobs, config)
    assert seen
    assert not any(tensor.requires_grad for tensor in seen)


@given(st.integers(0, 99), st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any), st.integers(1, 4))
def test_products_that_are_not_multiplied_out_have_the_same_norms_and_sums(seed, counts, tokens):
    generator = torch.Generator().manual_seed(seed)
    g, x = (torch.randn(sum(counts), tokens, d, generator=generator, dtype=torch.float64) for d in (3, 5))
    layout = RowLayout()
    layout.set_rows(counts)
    products, explicit = RowProducts(g, x), torch.einsum("nto,nti->noi", g, x)
    weights = torch.rand(sum(counts), generator=generator, dtype=torch.float64)
    assert torch.allclose(products.norms(), explicit.flatten(1).norm(dim=1), rtol=1e-12)
    assert torch.allclose(products.sum_rows(layout, weights), layout.sum_rows(explicit, weights), rtol=1e-12)
    both = products + RowProducts(2 * g, x)
    assert torch.allclose(both.norms(), 3 * products.norms(), rtol=1e-12)


@pytest.mark.parametrize("common", [0.0, 1.0, 1e2, 1e4, 1e6])
def test_positions_that_cancel_are_clipped_all_the_same(common):
    """As those of attention's keys do, whose gradients sum to 0: their norm is lost in the rounding of its terms."""
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(8, 16, d, generator=generator) for d in (48, 64))
    g, x = g - g.mean(1, keepdim=True), x + common * torch.randn(64, generator=generator)
    layout = RowLayout()
    layout.set_rows([1] * 8)
    products = RowProducts(g, x)
    clipped = products.sum_rows(layout, (1 / (products.norms() + 1e-6)).clamp(max=1.0))
    assert float(clipped.flatten(1).norm(dim=1).max()) < 1.002


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_gradient_that_overflowed_is_left_out(ghost, value):
    """A NaN in the sum would tell that its example is in the batch."""
    g, x = torch.ones(3, 2, 4, dtype=torch.float64), torch.ones(3, 2, 5, dtype=torch.float64)
    g[1, 0, 0] = value
    sample = RowProducts(g, x) if ghost else torch.einsum("nto,nti->noi", g, x)
    weight = nn.Parameter(torch.zeros(1, 4, 5, dtype=torch.float64))
    layout = RowLayout()
    layout.set_rows([3])
    optimizer = StackedDPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        noise_multipliers=[0.0],
        max_grad_norm=1.0,
        expected_batch_sizes=[1.0],
        generators=[None],
        layout=layout,
    )
    weight.grad_sample = sample
    optimizer.step()
    # The two others, of norm 2 sqrt(20), are clipped to 1.
    others = torch.full((1, 4, 5), -2 / math.sqrt(20), dtype=torch.float64)
    assert torch.allclose(weight.detach(), others, rtol=1e-5)


def test_ghost_norms_are_chosen_by_size():
    assert not ghost_norms_pay(64, 384, 8)  # LoRA's B: the rank is far below the length
    assert ghost_norms_pay(64, 256, 256)  # a large Fed-SB matrix
    assert ghost_norms_pay(1, 2, 384)  # a head on pooled tokens
    config = tiny.settings("bert")
    adapted = tiny.adapted_model("bert", config)
    chosen = choose_ghost_norms(adapted, tiny.trained_names(adapted, config), 10**4)
    assert {name for name, ghost in chosen.items() if ghost} == {"classifier.weight"}


def test_a_cohort_of_separate_stock_opacus_runs():
    """Opacus' clipping and noise, written out, for each client by its own sigma and divisor."""
    config = tiny.settings("mean", client={"optimizer": "sgd", "local_steps": 1})
    adapted = tiny.adapted_model("mean", config, torch.float64)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    examples = tiny.table("mean", 12)
    plans = [tiny.plan(0.5, 0.05, 1.0, 3.0), tiny.plan(1.5, 0.05, 1.0, 7.0), tiny.plan(1.0, 0.05, 1.0, 2.0)]
    jobs = tiny.jobs_of([start] * 3, tiny.split([3, 7, 2]), plans, learning_rate=1.0)
    results = train_cohort(adapted, examples, jobs, config)
    for job, plan, result in zip(jobs, plans, results, strict=True):
        model, parameters = stock_model("mean", adapted, start)
        batch = examples.batch(job.rows)
        wrapped = GradSampleModule(model, loss_reduction="sum")
        output = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        examples.task.loss(output.logits, batch["labels"]).sum().backward()
        noise = cohort._Generators(config.run.seed, job, torch.device("cpu")).noise
        # The noise of several steps is drawn at once, and this run takes only the first.
        numbers = torch.empty(NOISE_STEPS, sum(p.numel() for p in parameters.values()), dtype=torch.float64)
        numbers.normal_(0, plan.noise_multiplier * plan.max_grad_norm, generator=noise)
        parts = numbers[0].split([p.numel() for p in parameters.values()])
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters.values()]).norm(dim=0)
        factors = (plan.max_grad_norm / (norms + 1e-6)).clamp(max=1)
        for (name, p), part in zip(parameters.items(), parts, strict=True):
            summed = torch.einsum("n,n...->...", factors, p.grad_sample)
            expected = start[name] - (summed + part.reshape(p.shape)) / plan.expected_batch_size
            torch.testing.assert_close(result.arrays[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_no_noise_and_a_huge_clip_equal_training_without_privacy(kind, optimizer):
    """Every batch holds all examples, so that the sampling is the same: batch_size >= n."""
    sizes = [5, 3]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        client = {"optimizer": optimizer, "local_steps": 4, "batch_size": 8}
        config = tiny.settings(kind, client=client)
        adapted = tiny.adapted_model(kind, config, dtype)
        start = adapted.arrays(tiny.trained_names(adapted, config))
        examples = tiny.table(kind, sum(sizes))
        results = []
        for private in (False, True):
            plans = [tiny.plan(0.0, 1e6, 1.0, n) for n in sizes] if private else None
            jobs = tiny.jobs_of([start] * 2, tiny.split(sizes), plans, learning_rate=0.003)
            results.append(train_cohort(adapted, examples, jobs, config))
        if (optimizer, dtype) == ("adamw", torch.float32):
            # AdamW in fp32 amplifies rounding where a gradient is about zero; the losses still agree.
            assert results[0][0].loss == tiny.same_loss(results[1][0].loss, 1e-5)
            continue
        for plain, noiseless in zip(*results, strict=True):
            assert tiny.difference(plain.arrays, start) > 1e-3
            assert tiny.difference(plain.arrays, noiseless.arrays) < tolerance


def one_row_updates(clip: float, config: Config, rows: int = 6) -> list[torch.Tensor]:
    """Updates of clients with one example each, so that an update is that row's clipped gradient."""
    adapted = tiny.adapted_model("bert", config, torch.float64)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    jobs = tiny.jobs_of([start] * rows, tiny.split([1] * rows), [tiny.plan(0.0, clip, 1.0, 1.0)] * rows, 1, 1.0)
    results = train_cohort(adapted, tiny.table("bert", rows), jobs, config)
    return [torch.cat([(start[n] - r.arrays[n]).flatten() for n in start]) for r in results]


@pytest.mark.parametrize("method", list(tiny.FACTORS))
def test_a_row_weighs_at_most_the_clipping_norm_head_included(method):
    config = tiny.settings("bert", method={"name": method}, client={"optimizer": "sgd", "local_steps": 1})
    raw = one_row_updates(1e9, config)
    norms = torch.stack([u.norm() for u in raw])
    for clip in (float(norms.median()), 0.01):
        for update, clipped in zip(raw, one_row_updates(clip, config), strict=True):
            assert clipped.norm() <= clip
            factor = min(1.0, clip / (float(update.norm()) + 1e-6))
            torch.testing.assert_close(clipped, update * factor, rtol=0, atol=1e-12)
    # The head is not a small part of the norm: clipping the adapters alone would not do.
    head = sum(p.numel() for p in nn.Linear(32, tiny.LABELS).parameters())
    assert all(u[-head:].norm() > 0.05 * u.norm() for u in raw)


def noise_of(
    method: str, plans: list[Any], rows: int = 2, **method_options: Any
) -> tuple[AdaptedModel, list[dict[str, torch.Tensor]]]:
    """Noise on the gradients of a single step: the update less that of a run without noise."""
    config = tiny.settings(
        "bert", method={"name": method, **method_options}, client={"optimizer": "sgd", "local_steps": 1}
    )
    adapted = tiny.adapted_model("bert", config, torch.float64)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    sizes = [rows] * len(plans)
    updates = []
    for noisy in (False, True):
        used = (
            plans if noisy else [tiny.plan(0.0, p.max_grad_norm, p.sample_rate, p.expected_batch_size) for p in plans]
        )
        jobs = tiny.jobs_of([start] * len(plans), tiny.split(sizes), used, learning_rate=1.0)
        updates.append(train_cohort(adapted, tiny.table("bert", sum(sizes)), jobs, config))
    return adapted, [{n: free.arrays[n] - r.arrays[n] for n in start} for free, r in zip(*updates, strict=True)]


def test_noise_has_the_variance_of_each_clients_plan():
    plans = [
        tiny.plan(0.5, 2.0, 1.0, 3.0),
        tiny.plan(2.0, 2.0, 1.0, 1.0),
        tiny.plan(1.0, 2.0, 1.0, 16.0),
        tiny.plan(0.0, 2.0, 1.0, 2.0),
    ]
    _, noises = noise_of("fedit", plans, rank=16)
    for plan, noise in zip(plans, noises, strict=True):
        expected = plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size
        flat = torch.cat([value.flatten() for value in noise.values()])
        assert float(flat.std()) == pytest.approx(expected, rel=0.05)
        assert abs(float(flat.mean())) <= 4 * expected / math.sqrt(len(flat))
        for name, value in noise.items():
            if value.numel() > 300:
                assert float(value.std()) == pytest.approx(expected, rel=0.15), name
        # The head gets as much as the adapters.
        assert float(noise["classifier.weight"].std()) == pytest.approx(expected, rel=0.25)
    assert all(not value.any() for value in noises[3].values())


def test_every_step_has_noise_of_its_own():
    """Whatever is drawn in advance, no number serves twice: not in a later step, not for another client."""
    steps = 20
    assert steps > 2 * NOISE_STEPS
    config = tiny.settings("bert", client={"optimizer": "sgd"})
    adapted = tiny.adapted_model("bert", config, torch.float64)
    start = {name: torch.zeros_like(a) for name, a in adapted.arrays(tiny.trained_names(adapted, config)).items()}
    plan = tiny.plan(1.5, 1.0, 1e-9, 1.0)
    places = []
    for taken in range(steps + 1):
        taken_config = config.model_copy(update={"client": config.client.model_copy(update={"local_steps": taken})})
        jobs = tiny.jobs_of([start] * 2, tiny.split([2, 2]), [plan] * 2, learning_rate=1.0)
        results = train_cohort(adapted, tiny.table("bert", 4), jobs, taken_config) if taken else None
        arrays = [r.arrays for r in results] if results else [start] * 2
        places.append(torch.stack([torch.cat([a.flatten() for a in one.values()]) for one in arrays]))
    noise = torch.cat([later - earlier for earlier, later in pairwise(places)])
    assert noise.shape[0] == 2 * steps
    assert noise.std(1).numpy() == pytest.approx(np.full(2 * steps, 1.5), rel=0.12)
    correlations = torch.corrcoef(noise) - torch.eye(2 * steps)
    assert correlations.abs().max() < 0.2
    assert len(noise.flatten().unique()) > 0.999 * noise.numel()


@pytest.mark.parametrize("method", list(tiny.FACTORS))
def test_noise_energy_in_the_update_follows_the_formulas(method):
    """Noise sigma an entry: FFA s^2 sigma^2 m |A|^2, Fed-SB s^2 sigma^2 r^2, LoRA with its product of two noises."""
    clients, sigma, rank = 300, 0.4, 4
    adapted, noises = noise_of(
        method, [tiny.plan(sigma, 1.0, 1.0, 1.0)] * clients, 1, rank=rank, target_modules=["intermediate.dense"]
    )
    drawn = tiny.adapted_model(
        "bert",
        tiny.settings("bert", method={"name": method, "rank": rank, "target_modules": ["intermediate.dense"]}),
        torch.float64,
    )
    values = drawn.arrays()
    measured = expected = 0.0
    for path, adapter in adapted.adapters.items():
        s, m, n = adapter.scaling, 48, 32
        assert s == 4.5 / rank
        if method == "fed-sb":
            a, b = values[f"{path}.sb_A"], values[f"{path}.sb_B"]
            updates = [s * b @ x[f"{path}.sb_R"] @ a for x in noises]
            expected += s**2 * rank**2 * sigma**2
        else:
            a, b = values[f"{path}.lora_A"], values[f"{path}.lora_B"]
            noise_a = [x.get(f"{path}.lora_A", torch.zeros_like(a)) for x in noises]
            updates = [s * ((b + x[f"{path}.lora_B"]) @ (a + y) - b @ a) for x, y in zip(noises, noise_a, strict=True)]
            energy = sigma**2 * m * float(a.norm()) ** 2
            if method == "fedit":
                energy += sigma**2 * n * float(b.norm()) ** 2 + sigma**4 * m * n * rank
            expected += s**2 * energy
        measured += float(np.mean([float(u.norm()) ** 2 for u in updates]))
        # Averaging c clients with equal weights divides the linear methods' energy by c.
        if method != "fedit":
            mean = torch.stack(updates).reshape(30, 10, m, n).mean(1)
            energy = np.mean([float(u.norm()) ** 2 for u in updates])
            assert float((mean**2).sum((1, 2)).mean()) == pytest.approx(energy / 10, rel=0.2)
    assert measured == pytest.approx(expected, rel=0.04)


def test_a_trainable_without_per_example_gradients_stops_training(monkeypatch):
    # Measuring the model finds these faults too, and first.
    monkeypatch.setattr("fedlora.training.cohort.check_sound", lambda *_: None)
    config = tiny.settings("bert", client={"optimizer": "sgd", "local_steps": 2})
    examples, rows = tiny.table("bert", 4), [np.arange(4)]

    def train(adapted: AdaptedModel) -> None:
        start = adapted.arrays(tiny.trained_names(adapted, config))
        train_cohort(adapted, examples, tiny.jobs_of([start], rows, [tiny.plan(1.0, 0.1, 1.0)]), config)

    # A layer that the model does not call.
    adapted = tiny.adapted_model("bert", config)
    encoder: Any = adapted.model.get_submodule("bert.encoder")
    encoder.layer = encoder.layer[:1]
    with pytest.raises(GuardError, match=r"layer\.1\..*no per-example gradient.*4 rows.*none"):
        train(adapted)
    # Weights used behind the layer's back: they train, but the layer's hook never sees them.
    adapted = tiny.adapted_model("bert", config)
    head = adapted.head["classifier"]
    adapted.model.set_submodule("classifier", _Bypass(head))
    with pytest.raises(GuardError, match="classifier"):
        train(adapted)
    # A layer that folds the batch into another dimension.
    adapted = tiny.adapted_model("bert", config)
    path, adapter = next(iter(adapted.adapters.items()))
    adapted.model.set_submodule(path, _Folded(adapter))
    with pytest.raises(GuardError, match="sees 32 rows of a batch of 4"):
        train(adapted)
    # Hooks that were never set.
    adapted = tiny.adapted_model("bert", config)
    monkeypatch.setattr(dp_module, "_tap", lambda *_: None)
    with pytest.raises(GuardError, match="no per-example gradient"):
        train(adapted)


class _Bypass(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layer.weight[0].T + self.layer.bias[0]


class _Folded(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(0, 1)).reshape(*x.shape[:2], -1)


def test_noise_from_entropy_has_the_plans_size():
    weight = nn.Parameter(torch.zeros(2, 100, 300))
    layout = RowLayout()
    layout.set_rows([0, 0])
    optimizer = StackedDPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        noise_multipliers=[0.5, 3.0],
        max_grad_norm=0.2,
        expected_batch_sizes=[1.0, 4.0],
        generators=[None, None],
        layout=layout,
    )
    optimizer.step()
    assert float(weight[0].detach().std()) == pytest.approx(0.5 * 0.2, rel=0.03)
    assert float(weight[1].detach().std()) == pytest.approx(3.0 * 0.2 / 4, rel=0.03)


def test_a_step_adds_up_physical_batches_before_its_noise():
    """Two halves signalled as one step give what the whole gives, and noise once."""
    layout = RowLayout()
    whole, halves = (nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)) for _ in range(2))
    samples = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def optimizer(p: nn.Parameter) -> StackedDPOptimizer:
        return StackedDPOptimizer(
            torch.optim.SGD([p], lr=1.0),
            noise_multipliers=[1.0, 0.5],
            max_grad_norm=0.7,
            expected_batch_sizes=[2.0, 4.0],
            generators=[torch.Generator().manual_seed(k) for k in range(2)],
            layout=layout,
        )

    first = optimizer(whole)
    layout.set_rows([2, 4])
    whole.grad_sample = samples
    first.step()
    second = optimizer(halves)
    for rows, counts in (([0, 2, 3], [1, 2]), ([1, 4, 5], [1, 2])):
        layout.set_rows(counts)
        halves.grad_sample = samples[rows]
        second.signal_skip_step(True)
        second.step()
        second.zero_grad()
        assert not halves.any()
    second.step()
    torch.testing.assert_close(whole, halves, rtol=0, atol=1e-14)
    assert whole.any()
    second.zero_grad(set_to_none=True)
    assert halves.grad is None
    assert halves.summed_grad is None


def test_losses_and_results_do_not_share_memory_with_the_model():
    config = tiny.settings("bert", client={"optimizer": "sgd", "local_steps": 1})
    adapted = tiny.adapted_model("bert", config)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    before = copy.deepcopy(start)
    job = ClientJob(0, 1, np.arange(4), start, 0.1, tiny.plan(1.0))
    first = train_cohort(adapted, tiny.table("bert", 4), [job], config)[0].arrays
    kept = copy.deepcopy(first)
    train_cohort(adapted, tiny.table("bert", 4), [job], config)
    assert tiny.difference(start, before) == 0
    assert tiny.difference(first, kept) == 0
