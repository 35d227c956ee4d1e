"""FlexLoRA: the best approximation of the mean of the updates at the rank, from factors alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.strategies.flexlora import truncated
from tests import tiny
from tests.small_runs import WEIGHTS, DrawnRounds


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_is_lost_is_the_tail(kind: str, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = DrawnRounds("flexlora", kind, dtype)
    largest = 0
    svd = torch.linalg.svd

    def noted(matrix: torch.Tensor, **options: Any) -> Any:
        nonlocal largest
        largest = max(largest, *matrix.shape)
        return svd(matrix, **options)

    for server_round, answering in enumerate([(0, 1, 2), (0, 2), (1,)], 1):
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "svd", noted)
            sent, result = rounds.round(server_round, answering)
        weights = [WEIGHTS[client] for client in answering]
        shares = [weight / sum(weights) for weight in weights]
        for path, adapter in rounds.adapted.adapters.items():
            b, a = result[f"{path}.lora_B"].double(), result[f"{path}.lora_A"].double()
            products = [adapter.scaling * f[f"{path}.lora_B"].double() @ f[f"{path}.lora_A"].double() for f in sent]
            ideal = sum(p * each for p, each in zip(shares, products, strict=True))
            assert isinstance(ideal, torch.Tensor)
            u, s, vh = svd(ideal)
            limit = tolerance * max(1.0, float(s[0]))
            best = (u[:, :3] * s[:3]) @ vh[:3]
            torch.testing.assert_close(adapter.scaling * b @ a, best, rtol=0, atol=10 * limit)
            lost = (ideal - adapter.scaling * b @ a).square().sum()
            assert float(lost) == pytest.approx(float(s[3:].square().sum()), rel=1e-4, abs=10 * limit)
            # One client of the rank loses nothing, several something.
            assert (float(s[3]) > 1e-2) == (len(answering) > 1)
            torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=10 * tolerance)
            torch.testing.assert_close(adapter.scaling * b.norm(dim=0), s[:3], rtol=0, atol=10 * limit)
        for name in rounds.adapted.head_names:
            mean = sum(p * a[name] for p, a in zip(shares, sent, strict=True))
            torch.testing.assert_close(result[name], mean, rtol=0, atol=10 * tolerance)
    assert largest == 9, "factors of three clients of rank 3"


def test_a_falling_rank_keeps_the_best_approximation_at_each() -> None:
    rounds = DrawnRounds("flexlora", rank=8, final_rank=2)
    ranks = [rounds.strategy.rank_after(r) for r in range(6)]  # type: ignore[attr-defined]
    assert ranks == [8, 6, 5, 3, 3, 2]
    for server_round in range(1, 6):
        sent, result = rounds.round(server_round)
        rank, shares = ranks[server_round], [weight / sum(WEIGHTS) for weight in WEIGHTS]
        for path in rounds.adapted.adapters:
            assert {len(arrays[f"{path}.lora_A"]) for arrays in sent} == {ranks[server_round - 1]}
            ideal = sum(p * f[f"{path}.lora_B"] @ f[f"{path}.lora_A"] for p, f in zip(shares, sent, strict=True))
            assert isinstance(ideal, torch.Tensor)
            u, s, vh = torch.linalg.svd(ideal)
            b, a = result[f"{path}.lora_B"], result[f"{path}.lora_A"]
            torch.testing.assert_close(b @ a, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=0, atol=1e-10)
            assert s[rank] > 0.1, "something is lost"


sizes = st.integers(1, 9)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4), sizes, sizes, st.integers(0, 99)
)
def test_any_ranks_give_the_leading_singular_values(ranks: list[tuple[int, int]], m: int, n: int, seed: int) -> None:
    """Fewer directions than the rank too: then the other rows are orthonormal, and of no weight yet."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank, total = min(m, n, 3), sum(weight for _, weight in ranks)
    pairs = [(weight / total, draw(m, r), draw(r, n)) for r, weight in ranks]
    b, a = truncated(pairs, draw(rank, n))
    assert (b.shape, a.shape) == ((m, rank), (rank, n))
    ideal = sum(p * left @ right for p, left, right in pairs)
    assert isinstance(ideal, torch.Tensor)
    u, s, vh = torch.linalg.svd(ideal, full_matrices=False)
    scale = max(1.0, float(s[0]))
    torch.testing.assert_close(b @ a, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=0, atol=1e-11 * scale)
    torch.testing.assert_close(a @ a.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_rank_cannot_rise() -> None:
    with pytest.raises(InputError, match=r"method\.final_rank = 4: is above method\.rank = 3"):
        tiny.settings("bert", method={"name": "flexlora", "rank": 3, "final_rank": 4})
