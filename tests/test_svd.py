"""The truncated decomposition against the full one, on spectra that decay slowly and quickly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora import svd
from fedlora.experts.expert import truncate
from fedlora.svd import truncated_svd

SPECTRA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": torch.ones_like,
    "slow": lambda i: i**-0.2,
    "power": lambda i: i**-1.0,
    "fast": lambda i: 0.5**i,
    "low rank": lambda i: (i < 6).double(),
}
ROUNDING = 3e-6
"""Of products in float32, relative to the largest singular value."""


def matrix(m: int, n: int, spectrum: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float32 matrix with random singular vectors, and its singular values."""
    generator = torch.Generator().manual_seed(seed)
    least = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(k, least, generator=generator, dtype=torch.float64))[0] for k in (m, n))
    values = SPECTRA[spectrum](torch.arange(1, least + 1, dtype=torch.float64))
    return ((u * values) @ v.T).float(), values


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "SMALL", 0)


@pytest.mark.usefixtures("all_large")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(40, 160),
    st.integers(40, 160),
    st.integers(1, 40),
    st.sampled_from(sorted(SPECTRA)),
    st.integers(0, 10**6),
)
def test_values_are_within_the_stated_error_and_vectors_orthonormal(
    m: int, n: int, rank: int, spectrum: str, seed: int
) -> None:
    w, values = matrix(m, n, spectrum, seed)
    found = truncated_svd(w, rank, seed=seed)
    eye = torch.eye(rank)
    torch.testing.assert_close(found.u.T @ found.u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.vh @ found.vh.T, eye, rtol=0, atol=1e-5)
    below = values[:rank] - found.s
    assert float(below.abs().max()) <= found.error * float(values[0]) + ROUNDING
    assert float(below.min()) >= -ROUNDING
    # What is left of W is as large as its values say: U S V^T is the projection of W onto the columns of U.
    left = float((w - (found.u * found.s) @ found.vh).double().square().sum())
    expected = float(w.double().square().sum() - found.s.double().square().sum())
    assert left == pytest.approx(expected, abs=1e-4 * float(values.square().sum()))


@pytest.mark.parametrize(
    ("spectrum", "error", "excess"), [("slow", 0.1, 0.01), ("power", 1e-3, 1e-5), ("fast", 1e-5, 1e-4)]
)
def test_a_large_matrix_is_nearly_as_well_approximated_as_it_can_be(spectrum: str, error: float, excess: float) -> None:
    w, values = matrix(1024, 1025, spectrum)
    rank = 8 if spectrum == "fast" else 32
    found = truncated_svd(w, rank)
    assert found.u.dtype == torch.float32
    assert 0 < found.error < error
    best = float(values[rank:].square().sum()) ** 0.5
    left = float(torch.linalg.matrix_norm(w.double() - (found.u * found.s).double() @ found.vh.double()))
    assert best * (1 - 1e-4) - 1e-6 <= left <= best * (1 + excess) + 1e-6


@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (5, 3)])
def test_small_matrices_are_decomposed_exactly(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    found = truncated_svd(w, 3)
    assert found.error == 0
    for part, whole in ((found.u, u[:, :3]), (found.s, s[:3]), (found.vh, vh[:3])):
        assert torch.equal(part, whole)


@pytest.mark.usefixtures("all_large")
def test_the_seed_alone_decides() -> None:
    w, _ = matrix(90, 80, "slow")
    before = torch.random.get_rng_state()
    first, second, other = (truncated_svd(w, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.vh, second.vh)
    assert not torch.equal(first.u, other.u)


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("rank", [3, 40])
def test_a_scale_of_either_sign(rank: int) -> None:
    w, _ = matrix(60, 50, "power")
    for scale in (2.0, -0.5):
        found, whole = truncated_svd(w, rank, scale=scale), truncated_svd(scale * w, rank)
        torch.testing.assert_close(found.s, whole.s, rtol=0, atol=1e-5)
        torch.testing.assert_close((found.u * found.s) @ found.vh, (whole.u * whole.s) @ whole.vh, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("all_large")
def test_a_matrix_of_zeros() -> None:
    found = truncated_svd(torch.zeros(40, 50), 3)
    assert found.error == 0
    assert not found.s.any()
    torch.testing.assert_close(found.u.T @ found.u, torch.eye(3), rtol=0, atol=1e-6)


class Doubles(TorchDispatchMode):
    """Notes the largest tensor in float64 that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor) and part.dtype == torch.float64:
                self.largest = max(self.largest, part.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_large_matrix_is_copied_to_float64(dtype: torch.dtype) -> None:
    w = torch.randn(1024, 1024).to(dtype)
    with Doubles() as seen:
        truncated_svd(w, 8)
        truncate(w, 8)
    assert 0 < seen.largest <= 1024 * 16
