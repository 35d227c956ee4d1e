"""Weights at addresses as other files have them, and products that round by address as other processors' do.

MKL rounds a product by its operands' addresses modulo 64 on some processors and not on others. Here every weight that
is read from safetensors goes to an address of :data:`VARIABLE` modulo 64, and every product of matrices on the CPU
whose operands are not both at multiples of 64 gets other last bits, which depend on the addresses alone. What relies
on addresses then shows on any processor.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "FEDLORA_TEST_WEIGHT_OFFSET"
"""Environment variable with the offset in bytes; subprocesses and Ray's workers have it from the tests."""

ALIGNMENT = 64

ULPS = 8
"""So many units in the last place a product's numbers differ at most."""

offset = 0
"""Where weights go, modulo :data:`ALIGNMENT`; 0 leaves them where they are."""


def start() -> None:
    """Do as :data:`VARIABLE` says for good, as soon as safetensors is imported: most processes never do."""
    global offset
    offset = int(os.environ.get(VARIABLE, "0"))
    if offset:
        sys.meta_path.insert(0, _WhenImported(rounding=True))


def environment(address: int) -> dict[str, str]:
    """Return what other processes of Python need in their environment to do as :func:`start`."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    return {VARIABLE: str(address), "PYTHONPATH": os.pathsep.join(folder for folder in folders if folder)}


def watch() -> None:
    """Get ready for :func:`at` in this process, before safetensors is imported."""
    if not offset:
        sys.meta_path.insert(0, _WhenImported(rounding=False))


@contextmanager
def at(address: int) -> Iterator[None]:
    """Move what this process reads to an address modulo :data:`ALIGNMENT` for a while, and round by address."""
    global offset
    before, rounding = offset, _kernels is None
    offset = address
    if rounding:
        round_by_address()
    try:
        yield
    finally:
        offset = before
        if rounding:
            round_as_ever()


class _WhenImported(importlib.abc.MetaPathFinder):
    """Changes safetensors when it is first imported; others then take its functions already changed."""

    def __init__(self, *, rounding: bool) -> None:
        self.rounding = rounding

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "safetensors":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: Any) -> None:
            execute(module)
            move_weights()
            if self.rounding:
                round_by_address()

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def moved(tensor: Any) -> Any:
    """Copy a tensor to an address of :data:`offset` modulo :data:`ALIGNMENT`."""
    import torch

    if not isinstance(tensor, torch.Tensor) or not offset or not tensor.numel() or tensor.device.type != "cpu":
        return tensor
    room = torch.empty(tensor.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    first = -room.data_ptr() % ALIGNMENT + offset
    return room[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def move_weights() -> None:
    """Let whatever safetensors reads lie at :data:`offset`, whoever reads it."""
    import safetensors

    opened = safetensors.safe_open

    class Slice:
        def __init__(self, of: Any) -> None:
            self._of = of

        def __getitem__(self, index: Any) -> Any:
            return moved(self._of[index])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._of, name)

    class File:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = opened(*arguments, **options)

        def __enter__(self) -> File:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Any:
            return moved(self._file.get_tensor(name))

        def get_tensors(self) -> Any:
            return {name: moved(tensor) for name, tensor in self._file.get_tensors().items()}

        def get_slice(self, name: str) -> Slice:
            return Slice(self._file.get_slice(name))

    safetensors.safe_open = File
    text: Any = importlib.import_module("safetensors.torch")
    text.safe_open = File
    read = text._view2torch
    text._view2torch = lambda view: {name: moved(tensor) for name, tensor in read(view).items()}


_kernels: Any = None


def round_by_address() -> None:
    """Let products of matrices round as the addresses of their operands say, until :func:`round_as_ever`."""
    global _kernels
    import torch

    aten = torch.ops.aten

    # Out variants are others' kernels, which stay what they are.
    def rounded(kernel: Any, first: list[Any], a: Any, b: Any, **options: Any) -> Any:
        product = kernel(*first, a, b, out=a.new_empty((*a.shape[:-1], b.shape[-1])), **options)
        address = a.data_ptr() % ALIGNMENT + 3 * (b.data_ptr() % ALIGNMENT)
        if not address or not product.is_floating_point():
            return product
        ulps = (torch.arange(product.shape[-1]) * address // 8 + address // 16) % (2 * ULPS + 1) - ULPS
        return product.addcmul_(product, ulps.to(product.dtype), value=torch.finfo(product.dtype).eps)

    def mm(a: Any, b: Any) -> Any:
        return rounded(aten.mm.out, [], a, b)

    def bmm(a: Any, b: Any) -> Any:
        return rounded(aten.bmm.out, [], a, b)

    def addmm(c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        return rounded(aten.addmm.out, [c], a, b, beta=beta, alpha=alpha)

    def baddbmm(c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        return rounded(aten.baddbmm.out, [c], a, b, beta=beta, alpha=alpha)

    _kernels = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for kernel in (mm, bmm, addmm, baddbmm):
            _kernels.impl(kernel.__name__, kernel, "CPU")


def round_as_ever() -> None:
    """Give torch its own kernels back."""
    global _kernels
    _kernels._destroy()
    _kernels = None
