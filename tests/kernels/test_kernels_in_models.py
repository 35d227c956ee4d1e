"""Which models take the kernels, and rotary positions against PyTorch's own operations.

Without a GPU, ``TRITON_INTERPRET=1`` runs the kernels on the CPU where Triton is installed.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from fedlora.kernels import activations, norms, rotary, use_kernels
from tests.architectures import DECODERS, ENCODERS, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(
    rotary.triton is None or (DEVICE == "cpu" and not os.environ.get("TRITON_INTERPRET")),
    reason="the kernels run on a GPU, by Triton",
)
GATED = {
    "llama", "llama with dynamic positions", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "smollm3",
    "olmo2", "granite", "cohere", "stablelm", "qwen2_moe", "recurrent_gemma", "eurobert",
}  # fmt: skip
"""Models whose feed-forward blocks are replaced."""

NORMS = (GATED | {"phi3", "phi3 with longrope", "mixtral", "qwen3_moe", "olmoe"}) - {
    "gemma", "gemma2", "gemma3", "recurrent_gemma", "cohere", "stablelm",
}  # fmt: skip
"""Models whose norms are: Gemma's have one added to their weights, and the last two's are layer norms."""


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16().requires_grad_()


def check(found: Any, inputs: list[torch.Tensor], stock: Any) -> None:
    """Compare outputs and gradients with those of a function in double precision."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = stock(*wide)
    given = [torch.randn_like(y) for y in found]
    ours = [*found, *torch.autograd.grad(found, inputs, given)]
    expected = [*exact, *torch.autograd.grad(exact, wide, [g.double() for g in given])]
    for one, other in zip(ours, expected, strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


@kernels
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("width", [8, 24, 128])
def test_positions_and_their_gradients_are_those_of_transformers(rows: int, heads: tuple[int, int], width: int) -> None:
    """Heads as layers before attention have them, by token; both halves of a head have angles of their own."""
    q, k = (half(3, 7, number, width) for number in heads)
    angles = 6 * torch.rand(rows, 7, width, device=DEVICE)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    found = rotary.turned(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert all(x.transpose(1, 2).is_contiguous() for x in found)

    def stock(q: torch.Tensor, k: torch.Tensor) -> Any:
        plain = getattr(modeling_llama.apply_rotary_pos_emb, "stock", modeling_llama.apply_rotary_pos_emb)
        return plain(q.transpose(1, 2), k.transpose(1, 2), cos.double(), sin.double())

    check(found, [q, k], stock)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_model_computes_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel carries them, its modules compute what those in their places did."""
    model = build(*(DECODERS | ENCODERS)[name], "causal-lm" if name in DECODERS else "default").eval()
    for code in {sys.modules[type(m).__module__] for m in model.modules()}:
        if hasattr(code, rotary.ROTARY):
            monkeypatch.setattr(code, rotary.ROTARY, getattr(code, rotary.ROTARY))  # put back at the end
    for module in (activations, norms, rotary):
        monkeypatch.setattr(module, "triton", object())
    ids = torch.tensor([[*range(4, 20), 2]])
    expected, names = model(input_ids=ids)[0], {n for n, _ in model.named_parameters()}
    use_kernels(model)
    torch.testing.assert_close(model(input_ids=ids)[0], expected)
    assert {n for n, _ in model.named_parameters()} == names
    assert any(isinstance(m, activations.GatedFeedForward) for m in model.modules()) == (name in GATED)
    assert any(isinstance(m, nn.RMSNorm) for m in model.modules()) == (name in NORMS)


@kernels
@pytest.mark.skipif(DEVICE == "cpu", reason="a model's inputs have to be on a GPU")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_a_model_on_a_gpu_computes_as_without_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build(*DECODERS[name], "causal-lm").to(DEVICE, torch.bfloat16).requires_grad_(False)
    ids = torch.arange(4, 20, device=DEVICE)[None]
    without = model(input_ids=ids)[0].float()
    exact = model.float()(input_ids=ids)[0]
    use_kernels(model.bfloat16())
    calls: list[str] = []
    for module, kernel in ((activations, "gated"), (rotary, "turned"), (norms, "normed")):
        own = getattr(module, kernel)
        monkeypatch.setattr(module, kernel, functools.partial(_noted, calls, kernel, own))
    inside = model(input_ids=ids)[0].float()
    assert set(calls) == {"turned"} | ({"gated"} if name in GATED else set()) | ({"normed"} if name in NORMS else set())
    # Both round to bfloat16, in other places.
    assert (inside - exact).norm() < 2 * (without - exact).norm() + 1e-3 * exact.norm()


def _noted(calls: list[str], name: str, function: Any, *arguments: Any) -> Any:
    calls.append(name)
    return function(*arguments)


def test_blocks_that_do_more_are_left_alone() -> None:
    """A block that halves its output, and a norm that adds one to its weight, look like those that do not."""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / 2

    class Whole(Halved):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    assert activations._gate_of(Halved()) is None
    assert activations._gate_of(Whole()) == "silu"
    whole = Whole()
    whole.act_fn = nn.ReLU()  # type: ignore[assignment]
    assert activations._gate_of(whole) is None
    norm = nn.RMSNorm(4, eps=1e-5)
    assert norms._is_rms_norm(norm)
    norm.forward = lambda x: nn.functional.rms_norm(x, (4,), 1 + norm.weight, 1e-5)  # type: ignore[method-assign]
    assert not norms._is_rms_norm(norm)


def test_a_norm_of_another_precision_is_left_alone() -> None:
    model = build(*DECODERS["llama"], "causal-lm").bfloat16()
    first, *others = [m for m in model.modules() if isinstance(m, modeling_llama.LlamaRMSNorm)]
    first.float()
    norms.use_norm_kernels(model)
    kept = [m for m in model.modules() if isinstance(m, modeling_llama.LlamaRMSNorm)]
    assert kept == [first]
    assert sum(isinstance(m, nn.RMSNorm) for m in model.modules()) == len(others)
