"""What averaging parameters does to updates: exact where they are linear in them, and by how much not elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapters.parameterisations.lora import LoRA
from fedlora.adapters.parameterisations.sb import SB, factors_from_pairs, leading_pairs
from fedlora.strategies.aggregation import Drift, WeightedMean, weighted_mean

cases = st.fixed_dictionaries(
    {
        "m": st.integers(2, 9),
        "n": st.integers(2, 9),
        "r": st.integers(1, 2),
        "s": st.sampled_from([0.5, 1.5, 4.0]),
        "weights": st.lists(st.integers(1, 50), min_size=2, max_size=5),
        "seed": st.integers(0, 10**6),
    }
)


class Federation:
    """Drawn clients of one layer, over two rounds: each starts from the mean and moves by a draw."""

    def __init__(self, case: dict, dtype: torch.dtype = torch.float64) -> None:
        self.m, self.n, self.r, self.s = case["m"], case["n"], case["r"], case["s"]
        self.weights, self.dtype = case["weights"], dtype
        total = sum(self.weights)
        self.p = [w / total for w in self.weights]
        self.generator = torch.Generator().manual_seed(case["seed"])

    def draw(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def rounds(self, shapes: dict[str, tuple[int, int]], shared: dict[str, torch.Tensor]):
        """Yield each round's clients, with their shared factors, and the mean of what they trained."""
        current = {name: self.draw(*shape) for name, shape in shapes.items()}
        for _ in range(2):
            clients = [{n: a + self.draw(*a.shape) for n, a in current.items()} for _ in self.weights]
            mean = weighted_mean(zip(clients, self.weights, strict=True))
            assert mean is not None
            assert {a.dtype for a in mean.values()} == {self.dtype}
            yield [client | shared for client in clients], mean | shared
            current = mean

    def update(self, kind, factors: dict[str, torch.Tensor]) -> torch.Tensor:
        a, b = kind.to_lora(factors)
        return self.s * b @ a

    def ideal(self, kind, clients: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return sum(p * self.update(kind, client) for p, client in zip(self.p, clients, strict=True))


@given(cases)
def test_fedit_misses_the_mean_update_by_the_covariance_of_the_factors(case):
    f = Federation(case)
    shapes = LoRA().shapes(f.m, f.n, f.r)
    for clients, mean in f.rounds(shapes, {}):
        error = f.ideal(LoRA(), clients) - f.update(LoRA(), mean)
        covariance = f.s * sum(
            p * (c["lora_B"] - mean["lora_B"]) @ (c["lora_A"] - mean["lora_A"])
            for p, c in zip(f.p, clients, strict=True)
        )
        torch.testing.assert_close(error, covariance, rtol=0, atol=1e-12 * f.s * 100)
        assert error.norm() > 1e-3
    # Where one factor is shared there is no error.
    for name in shapes:
        drawn = {name: f.draw(*shapes[name])}
        others = {other: shape for other, shape in shapes.items() if other != name}
        for clients, mean in f.rounds(others, drawn):
            error = f.ideal(LoRA(), clients) - f.update(LoRA(), mean)
            assert error.norm() < 1e-11


@given(cases)
def test_ffa_lora_is_exact(case):
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        f = Federation(case, dtype)
        shapes = LoRA().shapes(f.m, f.n, f.r)
        shared = {"lora_A": f.draw(*shapes["lora_A"])}
        for clients, mean in f.rounds({"lora_B": shapes["lora_B"]}, shared):
            torch.testing.assert_close(f.update(LoRA(), mean), f.ideal(LoRA(), clients), rtol=1e-5, atol=tolerance)


@given(cases)
def test_fed_sb_is_exact(case):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        f = Federation(case, dtype)
        vectors = factors_from_pairs(leading_pairs(f.draw(f.m, f.n), f.r))
        shared = {name: vectors[name] for name in ("sb_A", "sb_B")}
        for clients, mean in f.rounds({"sb_R": (f.r, f.r)}, shared):
            a, b = shared["sb_A"], shared["sb_B"]
            ideal = sum(f.s * p * b @ c["sb_R"] @ a for p, c in zip(f.p, clients, strict=True))
            torch.testing.assert_close(f.s * b @ mean["sb_R"] @ a, ideal, rtol=1e-5, atol=tolerance * 10)
            torch.testing.assert_close(f.update(SB(), mean), f.ideal(SB(), clients), rtol=1e-5, atol=tolerance * 10)


@given(cases)
def test_a_client_of_weight_nothing_does_not_count(case):
    f = Federation(case)
    clients = [{"x": f.draw(f.m, f.n)} for _ in f.weights]
    mean = weighted_mean(zip(clients, f.weights, strict=True))
    extra = WeightedMean()
    extra.add({"x": f.draw(f.m, f.n)}, 0)
    assert extra.result() is None
    for client, weight in zip(clients, f.weights, strict=True):
        extra.add(client, weight)
    assert torch.equal(extra.result()["x"], mean["x"])
    # Only the ratios of weights matter.
    scaled = weighted_mean(zip(clients, [w / 7 for w in f.weights], strict=True))
    torch.testing.assert_close(scaled["x"], mean["x"], rtol=0, atol=1e-13)


@given(cases)
def test_streamed_drift_is_its_definition(case):
    f = Federation(case)
    start = {name: f.draw(f.m, f.n) for name in "xy"}
    clients = [{name: a + f.draw(f.m, f.n) for name, a in start.items()} for _ in f.p]
    drift, flat = Drift(start), lambda arrays: torch.cat([arrays[name].flatten() for name in start])
    for client, weight in zip(clients, f.weights, strict=True):
        drift.add(client, weight)
    moves = [flat(client) - flat(start) for client in clients]
    mean = sum(p * move for p, move in zip(f.p, moves, strict=True))
    spread = sum(p * (move - mean).square().sum() for p, move in zip(f.p, moves, strict=True))
    found = drift.result(weighted_mean(zip(clients, f.weights, strict=True)))
    assert found == pytest.approx(float(spread / mean.square().sum()), rel=1e-9, abs=1e-9)


def test_clients_that_agree_do_not_drift_and_a_mean_at_rest_has_no_drift():
    start = {"x": torch.zeros(3)}
    drift = Drift(start)
    assert drift.result(None) is None
    for weight in (1, 5):
        drift.add({"x": torch.ones(3)}, weight)
    assert drift.result({"x": torch.ones(3)}) < 1e-12
    assert drift.result(start) is None
