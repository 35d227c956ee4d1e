"""Fed-SB's federated start: the SVD of a gradient that clients sum up, private as any step, charged once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora import simulate
from fedlora.adapters import AdaptedModel, adapt
from fedlora.adapters.model import linear_shape
from fedlora.adapters.parameterisations import sb
from fedlora.arrays import Arrays
from fedlora.clients.fed_sb import SketchingHalf
from fedlora.clients.resources import client_data
from fedlora.config import Config
from fedlora.data.tokens import FederatedData, TokenTable
from fedlora.errors import InputError, RunError
from fedlora.privacy import PrivacyPlan
from fedlora.privacy.calibration import plan_privacy, plan_server, spent_epsilon
from fedlora.results.checkpoint import Checkpoint
from fedlora.results.folder import RunResult
from fedlora.results.privacy_spent import AGREES, explain_privacy, second_opinion
from fedlora.strategies import gathering
from fedlora.strategies.fed_sb import FedSB, mean_gradients
from fedlora.training import ClientJob
from fedlora.training.cohort import train_cohort
from tests import tiny
from tests.llama_runs import OWNERS, LlamaRuns, adapter, lines, payload, table

RANK, MORE = 2, 3
WIDTH = RANK + MORE
METHOD: dict[str, Any] = {"name": "fed-sb", "rank": RANK, "init": "federated", "init_oversampling": MORE, "alpha": 3.0}
WHOLE = {**METHOD, "init_oversampling": 1000}
"""Sketches as wide as layers of one shape are, so that nothing of the gradient is lost."""
PRIVATE: dict[str, Any] = {"mode": "example", "target_epsilon": 3.0, "target_delta": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Arrays]:
    """What the server made of the clients' answers, by run."""
    made: list[Arrays] = []
    make = FedSB.start_arrays

    def noted(self: FedSB, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        made.append(make(self, adapted, data))
        return made[-1]

    monkeypatch.setattr(FedSB, "start_arrays", noted)
    return made


# The decomposition.


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
def test_a_matrix_of_the_sketches_rank_is_decomposed_exactly(m: int, n: int, rank: int, more: int, seed: int) -> None:
    rank = min(rank, m, n)
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (m, n))
    descent, width = left @ right.T, min(rank + more, m, n)
    omega = torch.randn(n, width, generator=generator, dtype=torch.float64)
    basis = sb.sketch_basis(descent @ omega)
    found = sb.factors_from_projection(basis, basis.T @ descent, rank, 5.0)
    u, s, vh = torch.linalg.svd(descent)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] * 5.0 / s[:rank].norm()
    got = found["sb_B"] @ found["sb_R"] @ found["sb_A"]
    assert float((got - expected).norm()) <= 1e-6 * max(1.0, float(s[0] / s[rank - 1]))
    assert float(found["sb_R"].norm()) == pytest.approx(5.0)
    check_orthonormal(found)


def test_a_gradient_of_zero_starts_at_the_base_model() -> None:
    found = sb.factors_from_projection(sb.sketch_basis(torch.zeros(6, 3)), torch.zeros(3, 5), 2, 1.0)
    assert not found["sb_R"].any()
    check_orthonormal(found)


def check_orthonormal(factors: Arrays, tolerance: float = 1e-6) -> None:
    b, a = factors["sb_B"].double(), factors["sb_A"].double()
    for gram in (b.T @ b, a @ a.T):
        assert float((gram - torch.eye(len(gram))).abs().max()) <= tolerance


# The whole start, without privacy.


@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj"], ["down_proj"]])
def test_without_privacy_it_is_the_svd_of_the_pooled_gradient(
    runs: LlamaRuns, starts: list[Arrays], modules: list[str]
) -> None:
    """Clients of uneven numbers of examples, layers square, wide and tall, alpha other than the rank."""
    method = {**WHOLE, "target_modules": modules}
    config = runs.config(method=method)
    runs.run(method=method)
    gradients, start = pooled(config), by_path(starts[0])
    assert start.keys() == gradients.keys()
    for path, gradient in gradients.items():
        u, s, vh = torch.linalg.svd(-gradient.double(), full_matrices=False)
        norm = 1e-4 / 1.5 * math.sqrt(gradient.numel())
        expected = (u[:, :RANK] * s[:RANK]) @ vh[:RANK] * norm / s[:RANK].norm()
        factors = start[path]
        got = factors["sb_B"] @ factors["sb_R"] @ factors["sb_A"]
        assert float((got - expected).norm()) <= 1e-4 * norm
        assert float(factors["sb_R"].norm()) == pytest.approx(norm, rel=1e-5)
        assert torch.equal(factors["sb_R"], factors["sb_R"].diag().diag())
        check_orthonormal(factors)


def test_a_narrow_sketch_keeps_most_of_the_gradient(runs: LlamaRuns, starts: list[Arrays]) -> None:
    runs.run(method=METHOD)
    for path, gradient in pooled(runs.config(method=METHOD)).items():
        factors, whole = by_path(starts[0])[path], torch.linalg.svdvals(gradient)[:RANK]
        check_orthonormal(factors)
        kept = (factors["sb_B"].T @ gradient @ factors["sb_A"].T).diag()
        assert bool((kept < 0).all())  # dW goes against the gradient
        assert float(kept.norm()) > 0.8 * float(whole.norm())


def pooled(config: Config) -> Arrays:
    """The gradient on all training examples, of a model without adapters in effect."""
    strategy, data = FedSB(config), client_data(config)
    return mean_gradients(strategy.server_model(data), data.train, np.arange(len(data.train)), 64)


def by_path(arrays: Mapping[str, torch.Tensor]) -> dict[str, Arrays]:
    found: dict[str, Arrays] = {}
    for name, array in arrays.items():
        path, _, kind = name.rpartition(".")
        found.setdefault(path, {})[kind] = array
    return found


def test_it_is_the_same_again_and_in_cohorts_and_whatever_the_rounds_are_like(
    runs: LlamaRuns, starts: list[Arrays]
) -> None:
    """A server's optimiser, a codec, a correction, moments that are kept and dropout are the rounds' alone."""
    once = runs.run(method=METHOD)
    again = runs.run(method=METHOD)
    assert all(torch.equal(array, adapter(again)[name]) for name, array in adapter(once).items())
    runs.run(method=METHOD, simulation={"cohort_size": 3})
    runs.run(
        method={**METHOD, "dropout": 0.5},
        server={"optimizer": "fedadam"},
        wire={"uplink_codec": "onebit"},
        client={"optimizer": "sgd", "correction": "scaffold", "warmup_rounds": 2, "local_steps": 2},
    )
    runs.run(method=METHOD, client={"keep_optimizer_state": True, "weight_decay": 0.1, "max_grad_norm": 1e-3})
    first, same, cohort, *others = starts
    for other in (same, *others):
        assert all(torch.equal(array, other[name]) for name, array in first.items())
    assert max(float((array - cohort[name]).abs().max()) for name, array in first.items()) < 1e-3


def test_clients_may_have_ranks_of_their_own(runs: LlamaRuns, starts: list[Arrays]) -> None:
    """They help with sketches of one width all the same."""
    runs.run(method=METHOD)
    result = runs.run(method={**METHOD, "ranks": [1, 2, 1, 2]})
    assert all(torch.equal(array, starts[1][name]) for name, array in starts[0].items())
    assert not any(line["failed"] for line in lines(result))


def test_secure_sums_carry_it(runs: LlamaRuns, starts: list[Arrays]) -> None:
    for secure in (False, True):
        runs.run(method=METHOD, server={"secure_aggregation": secure})
    plain, masked = starts
    for name, array in plain.items():
        torch.testing.assert_close(masked[name], array, rtol=1e-3, atol=1e-5)


def test_its_bytes_are_forecast_with_secure_sums_too(runs: LlamaRuns) -> None:
    sections = {"method": METHOD, "server": {"secure_aggregation": True}}
    result, expected = runs.run(**sections), runs.forecast(**sections)
    assert payload(result, "down") == expected.downlink_bytes
    assert payload(result, "up") == expected.uplink_bytes


@pytest.mark.parametrize("asked", [OWNERS, OWNERS // 2])
def test_its_bytes_are_the_formulas_and_the_forecasts(runs: LlamaRuns, asked: int) -> None:
    """k (m + n) numbers up for each client and layer, k m down; once, and apart from the rounds."""
    sections = {"method": METHOD, "server": {"fraction_train": asked / OWNERS}}
    result, expected = runs.run(**sections), runs.forecast(**sections)
    said = {"initial": expected.initial_bytes, "down": expected.downlink_bytes, "up": expected.uplink_bytes}
    assert {direction: payload(result, direction) for direction in said} == said
    strategy = FedSB(runs.config(method=METHOD))
    layers = strategy.sizes(strategy.server_model(client_data(strategy.config))).layers
    rows = [row for row in table(result, "communication.csv") if row["round"] == "0"]
    sent = {way: sum(int(row["payload_bytes"]) for row in rows if row["direction"] == way) for way in ("down", "up")}
    assert sent["up"] == 4 * asked * WIDTH * sum(m + n for m, n in layers)
    assert sent["down"] == 4 * asked * WIDTH * sum(m for m, _ in layers)
    assert expected.steps == asked * (2 + 3)


# One client's answer.


class Sketches:
    """A client half on a tiny model, and its examples."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.config = tiny.settings(kind, method={**METHOD, "target_modules": "all-linear"})
        self.adapted = adapt(tiny.base_model(kind, dtype), self.config, "sb")
        self.half = SketchingHalf(self.adapted, self.config)
        self.table = tiny.table(kind, 12)

    def answer(
        self, exchange: int, rows: np.ndarray, plan: PrivacyPlan | None, basis: Arrays | None = None, seed: int = 0
    ) -> Arrays:
        """Return what a client answers, with a seed of its noise."""
        settings = {"server-round": 0, "exchange": exchange, "sketch": 3}
        self.half.prepare(settings)
        self.adapted.set_shared(basis or {})
        config = FedSB.start_exchanges(self.config)[exchange - 1].training(self.config)
        job = ClientJob(seed, 0, rows, self.half.begin({}), 1.0, plan, exchange=exchange)
        return self.half.train(self.table, [job], config)[0].arrays

    def basis(self, scale: float = 1.0) -> Arrays:
        """Return some Q for every layer, orthonormal times a scale."""
        generator = torch.Generator().manual_seed(1)
        shapes = {path: linear_shape(adapter.base)[0] for path, adapter in self.adapted.adapters.items()}
        drawn = {path: torch.randn(m, WIDTH, generator=generator) for path, m in shapes.items()}
        return {f"{path}.sb_B": scale * sb.sketch_basis(array) for path, array in drawn.items()}


@pytest.fixture(params=["mean", "gpt2"])
def sketches(request: pytest.FixtureRequest) -> Sketches:
    return Sketches(request.param)


def test_an_answer_is_the_mean_gradient_times_what_was_sent(sketches: Sketches) -> None:
    rows, basis = np.arange(7), sketches.basis()
    first, second = sketches.answer(1, rows, None), sketches.answer(2, rows, None, basis)
    sketches.half.prepare({"server-round": 0, "sketch": 3})
    omega = {path: sketches.adapted.parameter(f"{path}.sb_A")[0].T.clone() for path in sketches.adapted.adapters}
    sketches.adapted.set_shared({f"{path}.sb_R": torch.zeros(WIDTH, WIDTH) for path in omega})
    for path, gradient in mean_gradients(sketches.adapted, sketches.table, rows, 4).items():
        tiny.assert_close(first[f"{path}.sb_B"], -gradient @ omega[path])
        tiny.assert_close(second[f"{path}.sb_A"], -basis[f"{path}.sb_B"].T @ gradient)


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_one_example_moves_a_sum_by_at_most_the_clipping_norm(sketches: Sketches, exchange: int, clip: float) -> None:
    """Over all layers together, whatever the server sends; and by all of it, where the example is clipped."""
    everybody, plan = np.arange(6), replace(tiny.plan(clip=clip, rate=1.0), expected_batch_size=1.0)
    for basis in [sketches.basis(), sketches.basis(1e4)] if exchange == 2 else [None]:
        whole = sketches.answer(exchange, everybody, plan, basis)
        for one in (0, 5):
            rest = sketches.answer(exchange, np.delete(everybody, one), plan, basis)
            alone = sketches.answer(exchange, everybody[one : one + 1], plan, basis)
            moved = norm({name: array - rest[name] for name, array in whole.items()})
            assert moved <= clip * (1 + 1e-4)
            assert moved == pytest.approx(norm(alone), rel=1e-2)
            if clip < 1:
                assert moved == pytest.approx(clip, rel=1e-2)


def norm(arrays: Arrays) -> float:
    return float(torch.cat([array.double().reshape(-1) for array in arrays.values()]).norm())


@pytest.mark.parametrize("exchange", [1, 2])
def test_the_noise_has_the_stated_variance_and_is_never_the_same(sketches: Sketches, exchange: int) -> None:
    rows, basis = np.arange(6), sketches.basis() if exchange == 2 else None
    plan = replace(tiny.plan(clip=0.1, rate=1.0), expected_batch_size=6.0)
    exact = sketches.answer(exchange, rows, plan, basis)
    noisy = [sketches.answer(exchange, rows, replace(plan, noise_multiplier=3.0), basis, seed) for seed in (0, 1)]
    first, second = (torch.cat([(a[name] - exact[name]).reshape(-1) for name in exact]) for a in noisy)
    for noise in (first, second, (first - second) / math.sqrt(2)):
        assert float(noise.std()) == pytest.approx(3.0 * 0.1 / 6, rel=5 / math.sqrt(2 * len(noise)))


def test_the_second_sketch_has_other_examples_and_noise_under_privacy_and_the_same_examples_without(
    sketches: Sketches, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def noted(adapted: AdaptedModel, table: TokenTable, jobs: list[ClientJob], *rest: Any) -> Any:
        seen.extend(job.exchange for job in jobs)
        return train_cohort(adapted, table, jobs, *rest)

    monkeypatch.setattr("fedlora.clients.half.train_cohort", noted)
    for plan in (None, tiny.plan()):
        for exchange in (1, 2):
            sketches.answer(exchange, np.arange(6), plan, sketches.basis() if exchange == 2 else None)
    assert seen == [1, 1, 1, 2]


def test_rounds_train_as_if_nothing_had_been_sketched(sketches: Sketches) -> None:
    arrays = dict(sketches.adapted.arrays())
    sketches.answer(1, np.arange(4), None)
    sketches.half.prepare({"server-round": 1})
    assert {n: a.shape for n, a in sketches.adapted.arrays().items()} == {n: a.shape for n, a in arrays.items()}
    given = {"x": torch.ones(1)}
    assert sketches.half.begin(given) is given


# What it costs.


def test_start_and_rounds_are_calibrated_together_and_two_libraries_agree(runs: LlamaRuns) -> None:
    result = runs.run(method=METHOD, privacy=PRIVATE)
    spent = explain_privacy(result.folder)
    plan = plan_privacy(runs.config(method=METHOD, privacy=PRIVATE), examples_of(result, spent.client))
    assert spent.start == plan.start == [(plan.start_noise_multiplier, 1.0, 2)]
    assert spent.history == [*plan.start, (plan.noise_multiplier, plan.sample_rate, plan.steps)]
    assert spent.epsilon == pytest.approx(spent.recorded, rel=1e-9)
    assert abs(spent.difference) <= AGREES
    assert 0.98 * 3 < result.summary["epsilon"]["max"] <= 3
    assert result.summary["epsilon"]["covers_init"] is True
    alone = second_opinion(1e-3, tuple(plan.start))["rdp"]
    assert 0.98 * 0.3 * 3 < alone <= 1.02 * 0.3 * 3
    rows = [row for row in table(result, "privacy.csv") if row["client"] == spent.client]
    assert [(row["round"], row["steps"]) for row in rows] == [
        ("0", "1"),
        ("0", "1"),
        ("1", "1"),
        ("2", "1"),
        ("3", "1"),
    ]
    assert float(rows[1]["epsilon"]) == pytest.approx(spent_epsilon("rdp", 1e-3, tuple(plan.start)), rel=1e-9)


def examples_of(result: RunResult, client: str) -> int:
    return sum(int(row["examples"]) for row in table(result, "partition.csv") if row["client"] == client)


def test_the_share_and_the_examples_say_what_the_start_may_spend(runs: LlamaRuns) -> None:
    def plan(**options: Any) -> PrivacyPlan:
        return plan_privacy(runs.config(method={**METHOD, **options}, privacy=PRIVATE), 20)

    half, most, few = plan(init_share=0.15), plan(init_share=0.9), plan(init_examples=5)
    usual = plan()
    assert half.start_noise_multiplier > usual.start_noise_multiplier > most.start_noise_multiplier  # type: ignore[operator]
    assert half.noise_multiplier < usual.noise_multiplier < most.noise_multiplier
    assert (usual.start_sample_rate, few.start_sample_rate) == (1.0, 0.25)
    assert few.for_start().expected_batch_size == pytest.approx(5.0)
    assert few.for_start().start == []
    given = plan_privacy(runs.config(method=METHOD, privacy={"mode": "example", "noise_multiplier": 1.3}), 20)
    assert given.start_noise_multiplier == given.noise_multiplier == 1.3
    with pytest.raises(ValueError, match="has no noise"):
        plan(init="svd").for_start()


def test_clients_as_units_are_clipped_and_noised_by_the_server(runs: LlamaRuns) -> None:
    privacy = {"mode": "client", "target_epsilon": 3.0, "target_delta": 1e-3}
    result, config = runs.run(method=METHOD, privacy=privacy), runs.config(method=METHOD, privacy=privacy)
    plan = plan_server(config, OWNERS)
    assert plan.releases == 2 + 3
    spent = explain_privacy(result.folder)
    assert spent.history == [(plan.noise_multiplier, 1.0, 2), (plan.noise_multiplier, 1.0, 3)]
    assert abs(spent.difference) <= AGREES
    assert [row["round"] for row in table(result, "privacy.csv")] == ["0", "0", "1", "2", "3"]
    assert result.summary["epsilon"]["max"] <= 3


def test_noise_of_clients_as_units_enters_the_start(runs: LlamaRuns, starts: list[Arrays]) -> None:
    for sigma in (0.0, 0.01, 1e3):
        privacy = {"mode": "client", "noise_multiplier": sigma, "clipping_norm": 0.01}
        runs.run(method=METHOD, privacy=privacy)
    exact, close, far = (starts[i] for i in range(3))
    names = [name for name in exact if name.endswith("sb_B")]

    def overlap(one: Arrays, other: Arrays) -> float:
        return float(np.mean([float((one[n].T @ other[n]).square().sum()) / RANK for n in names]))

    assert overlap(exact, close) > 0.7
    assert overlap(exact, far) < 0.4


# Stopped, resumed, refused.


class StoppedError(Exception):
    """The server's end, in the middle of the start."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], pytest.MonkeyPatch]:
    """Let runs end at the second exchange: before it, or once its answers came and before they are committed."""

    def at(function: str) -> pytest.MonkeyPatch:
        whole = getattr(gathering, function)

        def stopping(federation: Any, starter: Any, exchange: int) -> Any:
            if exchange == 2:
                raise StoppedError
            return whole(federation, starter, exchange)

        monkeypatch.setattr(gathering, function, stopping)
        return monkeypatch

    return at


@pytest.mark.parametrize("where", ["_ask", "_save"])
@pytest.mark.parametrize("privacy", [{"mode": "none"}, PRIVATE, {"mode": "client", "noise_multiplier": 1.0}])
def test_a_run_that_stopped_between_the_exchanges_goes_on_to_the_same_bits(
    runs: LlamaRuns, stop: Callable[[str], pytest.MonkeyPatch], tmp_path: Path, where: str, privacy: dict[str, Any]
) -> None:
    content = runs.config(method=METHOD, privacy=privacy).model_dump(exclude_none=True)
    with runs._cache():
        patched = stop(where)
        with pytest.raises(StoppedError):
            simulate(content, output=tmp_path / "run")
        patched.undo()
        with closing(Checkpoint(tmp_path / "run" / "checkpoint" / "state.sqlite")) as saved:
            assert saved.get("gathered") == 1
    with runs._cache():
        resumed = simulate(content, output=tmp_path / "run", resume=True)
    whole = runs.run(method=METHOD, privacy=privacy)
    assert all(torch.equal(array, adapter(resumed)[name]) for name, array in adapter(whole).items())
    for file in ("communication.csv", "privacy.csv"):
        assert table(whole, file) == table(resumed, file)
    for key in ("epsilon", "communication"):
        assert whole.summary[key] == resumed.summary[key]


def test_a_start_that_too_few_answer_ends_the_run(runs: LlamaRuns) -> None:
    with pytest.raises(RunError, match=r"exchange 1 of the start gave nothing: 4 replies are fewer than server\.min"):
        runs.run(method=METHOD, server={"min_replies": 5})


def test_its_keys_are_noted_where_they_have_no_use(runs: LlamaRuns) -> None:
    def unused(**options: Any) -> set[str]:
        config = runs.config(method={"name": "fed-sb", **options}, privacy=options.pop("privacy", {}))
        return {key for keys, _ in FedSB.unused(config) for key in keys.split()}

    assert {"init_oversampling", "init_share"} <= unused(init="svd")
    assert unused(init="federated") == {"init_not_covered", "init_share"}
    config = runs.config(method=METHOD, privacy=PRIVATE)
    assert {key for keys, _ in FedSB.unused(config) for key in keys.split()} == {"init_not_covered"}


def test_a_share_of_all_is_refused(runs: LlamaRuns) -> None:
    with pytest.raises(InputError, match=r"method\.init_share"):
        runs.config(method={**METHOD, "init_share": 1.0})
