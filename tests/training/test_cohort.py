"""A client's result does not depend on who shares the pass: a cohort of K equals K clients alone."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdaptedModel
from fedlora.config import Config
from fedlora.errors import GuardError
from fedlora.roles import HEAD
from fedlora.training import ClientJob, cohort, train_cohort
from fedlora.training.cohort import learning_rate
from tests import tiny

TOLERANCE = {("sgd", "float32"): 1e-6, ("adamw", "float64"): 1e-10, ("sgd", "float64"): 1e-12}
DRAWN: dict[int, dict[str, torch.Tensor]] = {}
"""What the models below started with: they keep what was last trained."""


@lru_cache(maxsize=64)
def model(kind: str, method: str, dropout: float, dtype: str) -> tuple[AdaptedModel, Config]:
    config = tiny.settings(kind, method={"name": method, "dropout": dropout, "target_modules": targets(kind)})
    adapted = tiny.adapted_model(kind, config, getattr(torch, dtype))
    DRAWN[id(adapted)] = adapted.arrays()
    return adapted, config


def targets(kind: str) -> list[str]:
    """A square and a non-square layer."""
    return {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}.get(kind, ["query", "intermediate.dense"])


def drawn_starts(adapted: AdaptedModel, config: Config, clients: int) -> list[dict[str, torch.Tensor]]:
    """Every client starts from something else, so that a mixture of clients would show."""
    starts = []
    for k in range(clients):
        generator = torch.Generator().manual_seed(100 + k)
        shared = {name: DRAWN[id(adapted)][name] for name in tiny.trained_names(adapted, config)}
        starts.append({n: a + 0.1 * torch.randn(a.shape, generator=generator).to(a) for n, a in shared.items()})
    return starts


def check_packing(
    adapted: AdaptedModel,
    config: Config,
    sizes: list[int],
    plans: list[tiny.PrivacyPlan] | None,
    rounds: int = 2,
    packings: list[list[list[int]]] | None = None,
) -> None:
    """Train in one pass, alone, and in other packings, over rounds; all must agree."""
    clients = len(sizes)
    kind = config.model.task
    examples = tiny.table("llama" if kind == "causal-lm" else "bert", sum(sizes))
    rows = tiny.split(sizes)
    names = tiny.trained_names(adapted, config)
    dtype = str(adapted.parameter(names[0]).dtype).removeprefix("torch.")
    tolerance = TOLERANCE[config.client.optimizer, dtype]
    packings = packings or [[[k] for k in range(clients)], [list(range(clients))[::-1]]]
    ways = [[list(range(clients))], *packings]
    starts = drawn_starts(adapted, config, clients)
    state = [list(starts) for _ in ways]
    rate = 0.01
    for server_round in range(1, rounds + 1):
        losses = []
        for way, packs in enumerate(ways):
            jobs = tiny.jobs_of(state[way], rows, plans, server_round, rate)
            loss = np.zeros(clients)
            for pack in packs:
                for k, result in zip(
                    pack, train_cohort(adapted, examples, [jobs[k] for k in pack], config), strict=True
                ):
                    assert result.examples == sizes[k]
                    assert result.arrays.keys() == set(names)
                    state[way][k] = result.arrays
                    loss[k] = result.loss
            losses.append(loss)
        for way in range(1, len(ways)):
            np.testing.assert_allclose(losses[0], losses[way], rtol=1e-5)
            for k in range(clients):
                assert tiny.difference(state[0][k], state[way][k]) < tolerance, (server_round, way, k)
    assert all(tiny.difference(starts[k], state[0][k]) > 1e-4 for k in range(clients))


cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(tiny.KINDS),
        "method": st.sampled_from(list(tiny.FACTORS)),
        "optimizer": st.sampled_from(list(TOLERANCE)),
        "sizes": st.lists(st.integers(1, 9), min_size=2, max_size=4),
        "dropout": st.sampled_from([0.0, 0.3]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "physical": st.sampled_from([None, 1, 3]),
        "steps": st.sampled_from([{"local_steps": 3}, {"local_epochs": 2}]),
        "clip": st.sampled_from([None, 0.05]),
        "sigmas": st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.3]), min_size=4, max_size=4),
    }
)

everything = {
    "optimizer": ("adamw", "float64"),
    "sizes": [9, 1, 4, 2],
    "dropout": 0.3,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "physical": 3,
    "steps": {"local_epochs": 2},
    "clip": 0.05,
    "sigmas": None,
}


@settings(max_examples=25)
@given(case=cases)
@example(case={**everything, "kind": "bert", "method": "fedit"})
@example(case={**everything, "kind": "mean", "method": "fed-sb", "sigmas": [1.0, 0.0, 0.5, 2.0]})
@example(case={**everything, "kind": "llama", "method": "ffa-lora", "optimizer": ("sgd", "float32")})
@example(case={**everything, "kind": "gpt2", "method": "fedit", "optimizer": ("sgd", "float32"), "sigmas": [0.7] * 4})
@example(case={**everything, "kind": "bert", "method": "fed-sb", "sizes": [4, 4, 4], "physical": None})
def test_a_cohort_equals_clients_alone(case):
    optimizer, dtype = case["optimizer"]
    adapted, config = model(case["kind"], case["method"], case["dropout"], dtype)
    client = {
        "optimizer": optimizer,
        "weight_decay": case["weight_decay"],
        "batch_size": 4,
        "physical_batch_size": case["physical"],
        "max_grad_norm": case["clip"],
        **case["steps"],
    }
    if optimizer == "sgd":
        client["momentum"] = case["momentum"]
    config = config.model_copy(update={"client": type(config.client)(**client)})
    plans = None
    if case["sigmas"]:
        rates = [0.4, 0.9, 0.2, 0.6]
        plans = [
            tiny.plan(s, 0.1, q, max(0.3, q * n)) for s, q, n in zip(case["sigmas"], rates, case["sizes"], strict=False)
        ]
        # Without noise a client that drew no row stays where it is.
        plans = [replace(p, sample_rate=1.0) if p.noise_multiplier == 0 else p for p in plans]
    check_packing(adapted, config, case["sizes"], plans)


@pytest.mark.parametrize("optimizer", [("sgd", "float32"), ("adamw", "float64")])
def test_empty_poisson_batches(optimizer, monkeypatch):
    """Steps where some clients, and steps where all of them, drew nothing: those still get their noise."""
    adapted, config = model("bert", "fedit", 0.3, optimizer[1])
    config = config.model_copy(
        update={"client": type(config.client)(optimizer=optimizer[0], batch_size=2, local_steps=6, momentum=0.5)}
    )
    drawn: list[list[int]] = []
    stock = cohort.poisson_batches

    def spied(*args):
        sizes: list[int] = []
        drawn.append(sizes)
        for batch in stock(*args):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(cohort, "poisson_batches", spied)
    check_packing(adapted, config, [3, 2, 2], [tiny.plan(0.6, 0.1, 0.15, 1.0)] * 3, rounds=3)
    first = np.array(drawn[:3])
    assert first.shape == (3, 6)
    assert (first.sum(0) == 0).any()
    assert ((first == 0).any(0) & (first > 0).any(0)).any()


def test_a_client_that_draws_nothing_at_all_moves_by_noise_alone():
    adapted, config = model("bert", "ffa-lora", 0.0, "float64")
    config = config.model_copy(update={"client": type(config.client)(optimizer="sgd", local_steps=2)})
    starts = drawn_starts(adapted, config, 2)
    rows = tiny.split([4, 4])
    results = []
    for sigma in (0.0, 1.0):
        jobs = tiny.jobs_of(starts, rows, [tiny.plan(sigma, 0.1, 1e-9)] * 2)
        results.append(train_cohort(adapted, tiny.table("bert", 8), jobs, config))
    assert all(tiny.difference(r.arrays, s) == 0 for r, s in zip(results[0], starts, strict=True))
    assert all(tiny.difference(r.arrays, s) > 0.01 for r, s in zip(results[1], starts, strict=True))
    assert all(np.isnan(result.loss) for result in results[1])
    assert [result.steps for result in results[1]] == [2, 2]


def test_an_early_client_is_read_when_it_is_done():
    """Momentum and weight decay go on moving the stacked rows of a client whose steps are over."""
    adapted, config = model("bert", "fedit", 0.0, "float64")
    client = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "batch_size": 1, "local_epochs": 1}
    config = config.model_copy(update={"client": type(config.client)(**client)})
    check_packing(adapted, config, [1, 6, 3], None, packings=[[[0], [1], [2]], [[2, 1, 0]], [[0, 2], [1]]])


def test_same_noise_whatever_the_packing():
    """Noise alone, to the bit: in any order, in any company."""
    adapted, config = model("mean", "fedit", 0.0, "float32")
    config = config.model_copy(update={"client": type(config.client)(optimizer="sgd", local_steps=1)})
    start = adapted.arrays(tiny.trained_names(adapted, config))
    start = {name: torch.zeros_like(array) for name, array in start.items()}
    rows = tiny.split([2] * 5)
    jobs = tiny.jobs_of([start] * 5, rows, [tiny.plan(s, 0.1, 1e-9) for s in (1.0, 2.0, 0.5, 1.0, 1.0)])
    examples = tiny.table("bert", 10)

    def noise(order: list[int]) -> dict[int, dict[str, torch.Tensor]]:
        return dict(
            zip(
                order,
                [r.arrays for r in train_cohort(adapted, examples, [jobs[k] for k in order], config)],
                strict=True,
            )
        )

    together = noise([0, 1, 2, 3, 4])
    for order in ([4, 2, 0, 3, 1], [3], [1, 0]):
        for k, arrays in noise(order).items():
            assert all(torch.equal(arrays[name], together[k][name]) for name in arrays)
    # And no two clients share it.
    flat = {k: torch.cat([a.flatten() for a in together[k].values()]) for k in together}
    matrix = torch.corrcoef(torch.stack(list(flat.values())))
    assert (matrix - torch.eye(5)).abs().max() < 0.15


def test_randomness_follows_seed_client_and_round():
    adapted, config = model("bert", "fedit", 0.0, "float32")
    config = config.model_copy(update={"client": type(config.client)(optimizer="sgd", local_steps=1)})
    start = adapted.arrays(tiny.trained_names(adapted, config))
    examples = tiny.table("bert", 4)

    def run(config: Config = config, **changes) -> dict[str, torch.Tensor]:
        job = replace(tiny.jobs_of([start], tiny.split([4]), [tiny.plan(1.0, 0.1, 0.5)])[0], **changes)
        return train_cohort(adapted, examples, [job], config)[0].arrays

    first = run()
    assert tiny.difference(first, run()) == 0
    assert tiny.difference(first, run(client=1)) > 0.001
    assert tiny.difference(first, run(server_round=2)) > 0.001
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 6})})
    assert tiny.difference(first, run(other)) > 0.001
    # A real node's noise is its own secret, new every time.
    secret = run(secret=True)
    assert tiny.difference(first, secret) > 0.001
    assert tiny.difference(secret, run(secret=True)) > 0.001
    # The global generator is neither read nor moved.
    state = torch.get_rng_state()
    torch.manual_seed(7)
    moved = torch.get_rng_state()
    assert tiny.difference(first, run()) == 0
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(state)


def test_a_nodes_noise_on_the_cpu_comes_from_no_generator_that_can_be_computed(monkeypatch):
    """A Mersenne Twister's state follows from numbers of it that a server has seen, and all noise from its state."""
    adapted, config = model("bert", "fedit", 0.0, "float32")
    config = config.model_copy(update={"client": type(config.client)(optimizer="sgd", local_steps=1)})
    start = adapted.arrays(tiny.trained_names(adapted, config))
    monkeypatch.setattr(cohort, "_generator", lambda device, sequence: torch.Generator().manual_seed(0))

    def run(secret: bool) -> dict[str, torch.Tensor]:
        job = replace(tiny.jobs_of([start], tiny.split([4]), [tiny.plan(1.0, 0.1, 0.5)])[0], secret=secret)
        return train_cohort(adapted, tiny.table("bert", 4), [job], config)[0].arrays

    assert tiny.difference(run(False), run(False)) == 0
    assert tiny.difference(run(True), run(True)) > 0.001


def test_generators_use_more_than_the_32_bits_of_a_seed():
    """torch.Generator.manual_seed on the CPU ignores all but the lowest 32 bits."""
    one = torch.Generator().manual_seed(1)
    assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=torch.Generator().manual_seed(1 + 2**32)))
    make = lambda *entropy: cohort._generator(torch.device("cpu"), np.random.SeedSequence(list(entropy)))  # noqa: E731
    generator = make(1, 2, 3)
    seed = generator.initial_seed() & 0xFFFFFFFF
    assert not torch.equal(
        torch.rand(4, generator=make(1, 2, 3)), torch.rand(4, generator=torch.Generator().manual_seed(seed))
    )
    values = torch.rand(200_000, generator=generator, dtype=torch.float64)
    assert values.mean() == pytest.approx(0.5, abs=0.005)
    assert values.var() == pytest.approx(1 / 12, rel=0.02)
    normal = torch.empty(200_000).normal_(0, 1, generator=generator)
    assert normal.std() == pytest.approx(1, rel=0.01)
    assert torch.equal(torch.rand(8, generator=make(4)), torch.rand(8, generator=make(4)))
    assert not torch.equal(torch.rand(8, generator=make(4)), torch.rand(8, generator=make(5)))


def test_physical_batches_change_nothing():
    """A logical batch is one step, however it is cut: the same gradient, clipping and noise."""
    for plans in (None, [tiny.plan(0.8, 0.1, 0.7, 4.0)] * 2):
        adapted, config = model("bert", "fedit", 0.0, "float64")
        starts = drawn_starts(adapted, config, 2)
        rows = tiny.split([9, 5])
        results = []
        for size in (None, 2, 1):
            client = {
                "optimizer": "adamw",
                "batch_size": 6,
                "physical_batch_size": size,
                "local_steps": 3,
                "max_grad_norm": 0.3,
            }
            cut = config.model_copy(update={"client": type(config.client)(**client)})
            jobs = tiny.jobs_of(starts, rows, plans, learning_rate=0.01)
            results.append(train_cohort(adapted, tiny.table("bert", 14), jobs, cut))
        for other in results[1:]:
            for whole, parts in zip(results[0], other, strict=True):
                assert tiny.difference(whole.arrays, parts.arrays) < 1e-12
                assert whole.loss == pytest.approx(parts.loss)


@pytest.mark.parametrize(
    ("stock", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, {}),
    ],
)
def test_a_client_alone_equals_plain_pytorch(stock, options):
    """K = 1 without privacy, clipping included: torch's own optimiser on the mean loss."""
    client = {"optimizer": stock.__name__.lower(), "max_grad_norm": 0.2, "batch_size": 8, "local_steps": 4, **options}
    config = tiny.settings("bert", client=client)
    adapted = tiny.adapted_model("bert", config, torch.float64)
    examples = tiny.table("bert", 8)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    result = train_cohort(adapted, examples, tiny.jobs_of([start], tiny.split([8]), learning_rate=0.01), config)[0]
    parameters = {name: torch.nn.Parameter(array[None].clone()) for name, array in start.items()}
    optimizer = stock(parameters.values(), lr=0.01, **options)
    batch = examples.batch(np.arange(8))
    losses = []
    adapted.set_clients([start])
    adapted.layout.set_rows([8])
    for _ in range(4):
        for name, value in parameters.items():
            layer, attribute = adapted._layers[name]
            setattr(layer, attribute, value)
        loss = torch.nn.functional.cross_entropy(adapted.logits(batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.2)
        optimizer.step()
        losses.append(loss.item())
    assert tiny.difference(result.arrays, {n: p.detach()[0] for n, p in parameters.items()}) < 1e-12
    assert result.loss == pytest.approx(np.mean(losses))


def test_alternating_factors_and_cohort_sizes():
    """RoLoRA's pattern: what was trained in one round is frozen in the next, with another number of clients."""
    config = tiny.settings("bert", client={"optimizer": "sgd", "local_steps": 2, "batch_size": 3})
    adapted = tiny.adapted_model("bert", config, torch.float64)
    examples = tiny.table("bert", 9)
    for factor, sizes in (("lora_B", [4]), ("lora_A", [5, 1, 3]), ("lora_B", [1, 2])):
        shared = adapted.arrays()
        names = adapted.names([factor, HEAD])
        jobs = tiny.jobs_of([{n: shared[n] for n in names}] * len(sizes), tiny.split(sizes))
        results = train_cohort(adapted, examples, jobs, config)
        assert adapted.trained == names
        frozen = set(shared) - set(names)
        assert not any(adapted.parameter(name).requires_grad for name in frozen)
        assert all(torch.equal(adapted.arrays([n])[n], shared[n]) for n in frozen)
        assert all(tiny.difference(r.arrays, j.arrays) > 0 for r, j in zip(results, jobs, strict=True))


@pytest.mark.parametrize("private", [False, True])
def test_stale_parameters_are_found(private, monkeypatch):
    """An optimiser that holds other parameters moves nothing, while loss and epsilon go on as ever."""
    stock = cohort._optimizer
    monkeypatch.setattr(
        cohort,
        "_optimizer",
        lambda client, named, *rest: stock(
            client, {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items()}, *rest
        ),
    )
    adapted, config = model("bert", "ffa-lora", 0.0, "float32")
    plans = [tiny.plan(1.0, 0.1, 1.0)] * 2 if private else None
    for steps in (1, 2):
        config = config.model_copy(update={"client": type(config.client)(optimizer="sgd", local_steps=steps)})
        jobs = tiny.jobs_of(drawn_starts(adapted, config, 2), tiny.split([4, 3]), plans)
        with pytest.raises(GuardError, match="stale parameter in the place of"):
            train_cohort(adapted, tiny.table("bert", 7), jobs, config)


def test_an_array_without_a_gradient_is_named():
    """A model that goes past an adapter trains nothing there."""
    adapted, config = model("bert", "fedit", 0.0, "float32")
    config = config.model_copy(update={"client": type(config.client)(optimizer="sgd", local_steps=2)})
    path, adapter = next(iter(adapted.adapters.items()))
    adapter.forward = adapter.base.forward
    jobs = tiny.jobs_of(drawn_starts(adapted, config, 2), tiny.split([4, 3]))
    with pytest.raises(GuardError, match=f"{path}.lora_[AB] has no gradient"):
        train_cohort(adapted, tiny.table("bert", 7), jobs, config)


@pytest.mark.parametrize("client", [{"max_grad_norm": 1e-4}, {"max_grad_norm": 1e-4, "proximal_mu": 0.5}])
def test_clipping_below_rounding_is_no_fault(client):
    """Gradients are clipped so far that no array of float32 changes."""
    adapted, config = model("bert", "ffa-lora", 0.0, "float32")
    client = {"optimizer": "sgd", "local_steps": 3, **client}
    config = config.model_copy(update={"client": type(config.client)(**client)})
    start = {n: 100 * torch.ones_like(a) for n, a in drawn_starts(adapted, config, 1)[0].items()}
    for result in train_cohort(adapted, tiny.table("bert", 7), tiny.jobs_of([start], tiny.split([7])), config):
        assert all(torch.equal(result.arrays[n], start[n]) for n in start)


@pytest.mark.parametrize("private", [False, True])
def test_steps_below_rounding_are_no_fault(private):
    """At the end of a schedule a rate may be so small that no array of float32 changes."""
    adapted, config = model("bert", "ffa-lora", 0.0, "float32")
    plans = [tiny.plan(1.0, 0.1, 1.0)] * 2 if private else None
    config = config.model_copy(update={"client": type(config.client)(optimizer="sgd", local_steps=3)})
    start = {n: torch.ones_like(a) for n, a in drawn_starts(adapted, config, 1)[0].items()}
    jobs = tiny.jobs_of([start] * 2, tiny.split([4, 3]), plans, learning_rate=1e-12)
    for result in train_cohort(adapted, tiny.table("bert", 7), jobs, config):
        assert all(torch.equal(result.arrays[n], start[n]) for n in start)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_has_no_gradient_may_stay(dropout):
    """LoRA's A, while B is 0 and frozen: of an alternating method whose first round did not count."""
    config = tiny.settings(
        "bert", method={"dropout": dropout}, client={"optimizer": "sgd", "local_steps": 3, "batch_size": 2}
    )
    adapted = tiny.adapted_model("bert", config)
    adapted.set_shared({n: torch.zeros_like(a) for n, a in adapted.arrays().items() if n.endswith("lora_B")})
    names = adapted.names(["lora_A", HEAD])
    start = adapted.arrays(names)
    results = train_cohort(adapted, tiny.table("bert", 7), tiny.jobs_of([start] * 2, tiny.split([4, 3])), config)
    for result in results:
        assert all(torch.equal(result.arrays[n], start[n]) == n.endswith("lora_A") for n in names)
    assert all(p.grad is None for p in adapted.parameters())


def test_the_guard_does_not_cry_wolf():
    """Two steps of which one drew no row are one step: LoRA's A may rightly stay while B = 0 and there is no noise."""
    config = tiny.settings("bert", client={"optimizer": "sgd", "local_steps": 2})
    adapted = tiny.adapted_model("bert", config)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    start = {n: torch.zeros_like(a) if n.endswith("lora_B") else a for n, a in start.items()}
    examples = tiny.table("bert", 2)
    drew = []
    for client in range(12):
        job = ClientJob(client, 1, np.arange(2), start, 0.1, tiny.plan(0.0, 1.0, 0.3))
        sampling = cohort._Generators(config.run.seed, job, torch.device("cpu")).sampling
        active = sum(len(b) > 0 for b in cohort.poisson_batches(job.rows, 0.3, 2, sampling))
        drew.append(active)
        moved = train_cohort(adapted, examples, [job], config)[0].arrays
        still = [n for n in moved if torch.equal(moved[n], start[n])]
        if active == 1:
            assert still == [n for n in moved if n.endswith("lora_A")]
        elif active == 2:
            assert not still
    assert {0, 1, 2} <= set(drew)


def test_unlike_jobs_are_refused():
    adapted, config = model("bert", "fedit", 0.0, "float32")
    starts = drawn_starts(adapted, config, 2)
    jobs = tiny.jobs_of(starts, tiny.split([3, 3]), [None, tiny.plan(1.0)])
    for unlike in (jobs, jobs[::-1], [replace(jobs[0], plan=None, learning_rate=r) for r in (0.1, 0.2)]):
        with pytest.raises(ValueError, match="share one learning rate"):
            train_cohort(adapted, tiny.table("bert", 6), unlike, config)


def test_wrong_arrays_are_named():
    adapted, config = model("bert", "fedit", 0.0, "float32")
    start = drawn_starts(adapted, config, 1)[0]
    name = next(iter(start))
    with pytest.raises(ValueError, match="no arrays named"):
        adapted.set_clients([{**start, "nowhere.lora_A": start[name]}])
    with pytest.raises(ValueError, match=name):
        adapted.set_clients([start, {**start, name: start[name][:, :-1]}])
    with pytest.raises(ValueError, match=name):
        adapted.set_shared({name: start[name].T[:2]})


def test_nothing_is_left_behind():
    """Hooks, per-example gradients and dropout generators are gone after a round, and after a round that failed."""
    adapted, config = model("bert", "fedit", 0.3, "float32")
    config = config.model_copy(update={"client": type(config.client)(optimizer="sgd", local_steps=2)})
    starts = drawn_starts(adapted, config, 1)
    jobs = tiny.jobs_of(starts, tiny.split([4]), [tiny.plan(1.0, 0.1, 1.0)])
    broken = [replace(jobs[0], rows=np.array([99]))]
    for attempt in (jobs, broken):
        if attempt is broken:
            with pytest.raises(IndexError):
                train_cohort(adapted, tiny.table("bert", 4), attempt, config)
        else:
            train_cohort(adapted, tiny.table("bert", 4), attempt, config)
        assert adapted.layout.dropout_generators is None
        assert not adapted.layout.per_example
        assert not hasattr(adapted.model, "autograd_grad_sample_hooks")
        assert not any(m._forward_hooks or m._backward_hooks for m in adapted.model.modules())
        assert not any(hasattr(p, "grad_sample") for p in adapted.model.parameters())


def test_learning_rate_of_a_round():
    def rates(rounds: int, **client) -> list[float]:
        section = tiny.settings(client=client).client
        return [learning_rate(section, 2.0, r, rounds) for r in range(1, rounds + 1)]

    assert rates(3) == [2.0, 2.0, 2.0]
    assert rates(4, lr_scheduler="linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(4, lr_scheduler="cosine") == pytest.approx([2.0, 1.7071067, 1.0, 0.2928932])
    assert rates(5, warmup_rounds=3) == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert min(rates(6, warmup_rounds=2, lr_scheduler="linear")) > 0
