"""Kernels run on the GPU of their tensors."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlora.kernels import launch


def test_the_device_changes_only_where_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: changed.append(device) or launch.nullcontext())
    for number in (0, 1, 0):
        card: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", number), get_device=lambda n=number: n)
        with launch.beside(card):
            pass
    with launch.beside(torch.zeros(1)):
        pass
    assert changed == [torch.device("cuda", 1)]


@pytest.mark.parametrize("file", sorted(Path(launch.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_no_kernel_is_launched_without_its_device(file: Path) -> None:
    """A launch is a call of a subscript: ``_kernel[grid](...)``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    withs = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    inside = {id(n) for w in withs if "beside" in ast.unparse(w.items[0]) for n in ast.walk(w)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
    assert all(id(call) in inside for call in calls)
    assert calls or file.stem in ("__init__", "launch")
