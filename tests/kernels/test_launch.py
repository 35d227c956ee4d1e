"""Kernels run on the GPU of their tensors: Triton takes the current one, and a split model has layers on others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fedlora.kernels import activations


@pytest.mark.parametrize("file", sorted(Path(activations.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_no_kernel_is_launched_without_its_device(file: Path) -> None:
    """A launch is a call of a subscript: ``_kernel[grid](...)``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    withs = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    on_device = [w for w in withs if ast.unparse(w.items[0]).startswith("torch.cuda.device_of(")]
    inside = {id(node) for w in on_device for node in ast.walk(w)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
    assert all(id(call) in inside for call in calls)
    assert calls or "@triton.jit" not in file.read_text(encoding="utf-8")
