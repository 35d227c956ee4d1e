"""FedSVD: refactoring loses nothing, keeps A's rows orthonormal, and works on factors of r alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.strategies.fedsvd import refactored
from tests.small_runs import WEIGHTS, DrawnRounds

SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rounds(kind: str, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = DrawnRounds("fedsvd", kind, dtype)
    shapes: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def noted(matrix: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    for server_round in range(1, 5):
        before = {name: array.clone() for name, array in rounds.arrays.items()}
        sent, result = rounds.round(server_round)
        for arrays in sent:
            assert set(arrays) == {*rounds.adapted.names(["lora_B"]), *rounds.adapted.head_names}
        for path in rounds.adapted.adapters:
            b, a, old = result[f"{path}.lora_B"], result[f"{path}.lora_A"], before[f"{path}.lora_A"]
            for rows in (old, a):
                eye = torch.eye(3, dtype=rows.dtype)
                torch.testing.assert_close(rows @ rows.T, eye, rtol=0, atol=tolerance)
            mean = sum(p * arrays[f"{path}.lora_B"] for p, arrays in zip(SHARES, sent, strict=True))
            torch.testing.assert_close(b @ a, mean @ old, rtol=0, atol=10 * tolerance)
            # U S: orthogonal columns, of falling lengths.
            gram = b.T @ b
            largest = float(gram.max())
            torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=10 * tolerance * largest)
            assert (gram.diag().diff() <= 0).all()
            assert not torch.allclose(a, old, atol=1e-3), "A turns"
    assert set(shapes) == {(3, 3)}


@given(st.integers(1, 6), st.integers(0, 6), st.integers(6, 20), st.integers(6, 20), st.integers(0, 1000))
def test_refactoring_where_the_mean_lost_rank(r: int, kept: int, m: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kept = min(kept, r)
    b, a = draw(m, kept) @ draw(kept, r), torch.linalg.qr(draw(n, r))[0].T
    left, right = refactored(b, a)
    assert (left.shape, right.shape) == ((m, r), (r, n))
    torch.testing.assert_close(left @ right, b @ a, rtol=0, atol=1e-12 * max(1.0, float(b.norm())))
    torch.testing.assert_close(right @ right.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12)
    # It is completed from A's row space.
    torch.testing.assert_close(right @ a.T @ a, right, rtol=0, atol=1e-12)


def test_the_start_is_the_base_model_with_orthonormal_rows() -> None:
    rounds = DrawnRounds("fedsvd", "llama")
    drawn = [rounds.arrays[name] for name in rounds.adapted.names(["lora_A"])]
    for i, a in enumerate(drawn):
        torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
        assert not any(a.shape == other.shape and torch.equal(a, other) for other in drawn[:i])
    assert not any(rounds.arrays[name].any() for name in rounds.adapted.names(["lora_B"]))


def test_its_basis_turns_so_that_nothing_is_kept_by_coordinates() -> None:
    assert not DrawnRounds("fedsvd").strategy.persistent
