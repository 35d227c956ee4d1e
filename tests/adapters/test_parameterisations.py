"""The starts of LoRA and of Fed-SB, and their reading as plain LoRA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapters.parameterisations import lora, sb
from fedlora.registry import PARAMETERISATIONS

shapes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10**6))


def matrix(m: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ranks(m: int, n: int) -> range:
    return range(1, min(m, n) + 1)


@given(shapes)
def test_the_svd_start_is_orthonormal_and_changes_nothing(shape):
    w = matrix(*shape)
    for r in ranks(*w.shape):
        factors = sb.factors_from_pairs(sb.leading_pairs(w, r))
        assert {f: tuple(v.shape) for f, v in factors.items()} == sb.SB().shapes(*w.shape, r)
        a, b = factors["sb_A"], factors["sb_B"]
        torch.testing.assert_close(a @ a.T, torch.eye(r, dtype=a.dtype), rtol=0, atol=1e-12)
        torch.testing.assert_close(b.T @ b, torch.eye(r, dtype=b.dtype), rtol=0, atol=1e-12)
        assert not factors["sb_R"].any()
        # They span the leading part of W0: what is left of W0 outside of it is the tail of its singular values.
        values = torch.linalg.svdvals(w)
        left = w - b @ (b.T @ w @ a.T) @ a
        assert float(left.square().sum()) == pytest.approx(float(values[r:].square().sum()), abs=1e-12)
        # B^T W0 A^T = diag(S) with S >= 0: the vectors' signs belong together.
        torch.testing.assert_close(b.T @ w @ a.T, torch.diag(values[:r]), rtol=0, atol=1e-12)


@given(shapes)
def test_the_gradient_start_is_the_truncated_sign_step(shape):
    g = matrix(*shape)
    eta = 0.03
    step = -eta * torch.sign(g)
    values = torch.linalg.svdvals(step)
    for r in ranks(*g.shape):
        factors = sb.factors_from_gradient(g, r, eta)
        a, rr, b = factors["sb_A"], factors["sb_R"], factors["sb_B"]
        torch.testing.assert_close(a @ a.T, torch.eye(r, dtype=a.dtype), rtol=0, atol=1e-12)
        torch.testing.assert_close(b.T @ b, torch.eye(r, dtype=b.dtype), rtol=0, atol=1e-12)
        torch.testing.assert_close(rr, torch.diag(values[:r]), rtol=0, atol=1e-12)
        error = float((step - b @ rr @ a).square().sum())
        assert error == pytest.approx(float(values[r:].square().sum()), abs=1e-12)
    torch.testing.assert_close(b @ rr @ a, step, rtol=0, atol=1e-12)  # whole at full rank


def test_zero_gradients_stay_zero():
    g = torch.zeros(3, 4)
    g[0, 0] = -5.0
    factors = sb.factors_from_gradient(g, 1, 0.1)
    update = factors["sb_B"] @ factors["sb_R"] @ factors["sb_A"]
    assert update[0, 0] == pytest.approx(0.1)
    assert update.abs().sum() == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_starts_keep_single_precision_at_least(dtype):
    w = matrix(6, 9, 0, dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for factors in (sb.factors_from_pairs(sb.leading_pairs(w, 2)), sb.factors_from_gradient(w, 2, 0.1)):
        assert {v.dtype for v in factors.values()} == {expected}
        a = factors["sb_A"]
        torch.testing.assert_close(a @ a.T, torch.eye(2, dtype=expected), rtol=0, atol=1e-6)


def test_the_sign_of_a_singular_pair_is_fixed():
    """The server sends B and A, but a start that is made twice should still be the same."""
    w = matrix(7, 5, 3)
    first, second = (
        sb.factors_from_pairs(sb.leading_pairs(w, 3)),
        sb.factors_from_pairs(sb.leading_pairs(w.T.contiguous().T, 3)),
    )
    torch.testing.assert_close(first["sb_A"], second["sb_A"], rtol=0, atol=1e-12)
    for row in first["sb_A"]:
        assert row[row.abs().argmax()] > 0


@given(shapes)
def test_the_gradient_of_r_is_that_of_the_weight_between_the_factors(shape):
    """g_R = s B^T g_W A^T, by autograd."""
    m, n, seed = shape
    r, s = min(m, n, 3), 1.7
    w = matrix(m, n, seed)
    factors = sb.factors_from_pairs(sb.leading_pairs(w, r))
    a, b = factors["sb_A"], factors["sb_B"]
    rr = matrix(r, r, seed + 1).requires_grad_()
    x, target = matrix(4, n, seed + 2), matrix(4, m, seed + 3)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ weight.T) - target).square().sum()

    dense = (w + s * b @ rr @ a).detach().requires_grad_()
    (g_w,) = torch.autograd.grad(loss(dense), dense)
    (g_r,) = torch.autograd.grad(loss(w + s * b @ rr @ a), rr)
    torch.testing.assert_close(g_r, s * b.T @ g_w @ a.T, rtol=0, atol=1e-10)


def test_the_lora_start():
    generator = torch.Generator().manual_seed(1)
    first = lora.initial_factors(6, 400, 50, generator)
    second = lora.initial_factors(6, 400, 50, generator)
    assert {f: tuple(v.shape) for f, v in first.items()} == lora.LoRA().shapes(6, 400, 50)
    a = first["lora_A"]
    assert not first["lora_B"].any()
    # Kaiming uniform with a = sqrt 5.
    reference = torch.empty(50, 400)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert a.abs().max() <= 1 / 400**0.5
    assert a.abs().max() == pytest.approx(float(reference.abs().max()), rel=0.01)
    assert float(a.std()) == pytest.approx(float(reference.std()), rel=0.02)
    # A layer has a draw of its own; the same seed gives the same draws.
    assert not torch.equal(a, second["lora_A"])
    assert torch.equal(a, lora.initial_factors(6, 400, 50, torch.Generator().manual_seed(1))["lora_A"])


@given(shapes)
def test_both_are_plain_lora(shape):
    m, n, seed = shape
    r = min(m, n, 3)
    drawn = {name: matrix(*size, seed + i) for i, (name, size) in enumerate(sb.SB().shapes(m, n, r).items())}
    a, b = sb.SB().to_lora(drawn)
    torch.testing.assert_close(b @ a, drawn["sb_B"] @ drawn["sb_R"] @ drawn["sb_A"])
    assert (b.shape, a.shape) == ((m, r), (r, n))
    plain = {"lora_A": matrix(r, n, seed), "lora_B": matrix(m, r, seed)}
    assert lora.LoRA().to_lora(plain) == (plain["lora_A"], plain["lora_B"])


def test_factors_are_named_in_the_order_of_the_input():
    names = {"lora": ("lora_A", "lora_B"), "sb": ("sb_A", "sb_R", "sb_B")}
    assert set(names) <= set(PARAMETERISATIONS.names())
    for kind, factors in names.items():
        shapes = PARAMETERISATIONS.get(kind)().shapes(9, 5, 2)
        assert tuple(shapes) == factors
        width = 5
        for rows, columns in shapes.values():
            assert columns == width
            width = rows
        assert width == 9
