"""An expert's arithmetic: truncation, exact combination of a domain's clients, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.experts import FULL
from fedlora.experts.expert import array_shapes, break_even_rank, combine, dense, numbers, truncate


@st.composite
def updates(draw):
    m, n = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    ranks = draw(st.lists(st.integers(1, min(m, n)) | st.just(FULL), min_size=1, max_size=4))
    weights = torch.tensor([draw(st.integers(1, 9)) for _ in ranks], dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def matrix(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = [matrix(m, n) if r == FULL else (matrix(m, r), matrix(r, n)) for r in ranks]
    return list(zip((weights / weights.sum()).tolist(), parts, strict=True)), min(m, n)


@given(updates())
def test_a_domain_is_combined_exactly_in_its_updates(drawn):
    parts, largest = drawn
    ideal = sum(p * dense(update) for p, update in parts)
    # At the largest rank, and as a whole matrix, nothing is lost.
    torch.testing.assert_close(dense(combine(parts, largest)), ideal, rtol=0, atol=1e-10)
    torch.testing.assert_close(combine(parts, FULL), ideal, rtol=0, atol=1e-10)
    values = torch.linalg.svdvals(ideal)
    for rank in range(1, largest):
        b, a = combine(parts, rank)
        assert (b.shape[1], a.shape[0]) == (rank, rank)
        error = float((dense((b, a)) - ideal).square().sum())
        assert error == pytest.approx(float(values[rank:].square().sum()), abs=1e-9)


def test_the_mean_of_the_factors_would_be_another_matrix():
    generator = torch.Generator().manual_seed(0)
    parts = [(w, (torch.randn(5, 2, generator=generator), torch.randn(2, 7, generator=generator))) for w in (0.3, 0.7)]
    by_factor = sum(w * b for w, (b, _) in parts) @ sum(w * a for w, (_, a) in parts)
    ideal = sum(w * b @ a for w, (b, a) in parts)
    assert (by_factor - ideal).norm() > 0.1
    torch.testing.assert_close(dense(combine(parts, 4)), ideal, rtol=0, atol=1e-5)


def test_truncation_balances_its_factors():
    delta = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b, a = truncate(delta, 3)
    values = torch.linalg.svdvals(delta)[:3]
    torch.testing.assert_close(b.T @ b, torch.diag(values), rtol=0, atol=1e-12)
    torch.testing.assert_close(a @ a.T, torch.diag(values), rtol=0, atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 40))
def test_break_even(m, n):
    rank = break_even_rank([(m, n)])
    assert rank == pytest.approx(m * n / (m + n))
    assert numbers([(m, n)], int(rank)) <= numbers([(m, n)], FULL) <= numbers([(m, n)], int(rank) + 1)


def test_names_and_shapes():
    shapes = array_shapes({"b.up": (5, 3)}, {"b": 3}, 2)
    assert shapes == {"b.up.lora_A": (2, 3), "b.up.lora_B": (5, 2), "b.router": (1, 3), "b.router_bias": (1, 1)}
    assert array_shapes({"b.up": (5, 3)}, {}, FULL) == {"b.up.delta": (5, 3)}
