"""A second device that is only a name, to run a split model where there is one device.

Within :class:`TwoDevices` tensors are on ``cpu`` or on ``cpu:1``, by what they were made or moved to. All are in
ordinary memory, so that the numbers are those of one device; but an operation on tensors of both is refused, as
between two GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)
DEVICES = [FIRST, SECOND]

_CROSSING = (
    torch.Tensor.copy_,
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
    torch._has_compatible_shallow_copy_type,  # asked before the data of a moved parameter is set
)
"""Functions that take tensors of two devices."""


class DeviceError(RuntimeError):
    """An operation met tensors of two devices."""


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in lists, tuples and dicts; faster than torch's pytree, since every function asks."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)


class TwoDevices(TorchFunctionMode):
    """Let tensors be on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def __enter__(self) -> TwoDevices:
        """Look at what runs in a backward pass too: hooks, and functions whose backward pass is Python."""
        self._engine = torch.autograd._engine_run_backward

        def run(*args: Any, **kwargs: Any) -> Any:
            TorchFunctionMode.__enter__(self)
            try:
                return self._engine(*args, **kwargs)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)

        torch.autograd._engine_run_backward = run
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.autograd._engine_run_backward = self._engine
        super().__exit__(*error)

    def put(self, model: nn.Module, places: Mapping[str, torch.device]) -> None:
        """Place a model's weights and buffers by the device map."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            (device,) = {places[path] for path in places if name == path or name.startswith(f"{path}.")}
            self._label([tensor], device)

    def place(self, tensor: torch.Tensor) -> torch.device | None:
        """Return where a tensor is; None for one that autograd has made."""
        storage = tensor.untyped_storage()
        found = self._places.get(storage._cdata)
        return None if found is None or found[0].expired() else found[1]

    def _label(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._places[storage._cdata] = StorageWeakRef(storage), device

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Apply a function, if all that it reads is on one device."""
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]  # a new object at every look
            return self.place(args[0]) or FIRST
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._to(func, args, kwargs)
        if func in (torch.Tensor.backward, torch.autograd.grad, torch.autograd.backward):
            return func(*args, **kwargs)
        wanted = kwargs.pop("device", None)
        leaves = list(_tensors((args, kwargs)))
        places = {self.place(leaf) for leaf in leaves if leaf.dim()} - {None}
        if len(places) > 1 and func not in _CROSSING:
            raise DeviceError(f"{getattr(func, '__name__', func)} meets tensors on {sorted(map(str, places))}")
        if func is torch.Tensor.numpy and SECOND in places:
            raise DeviceError("numpy reads no tensor of another device")
        result = func(*args, **kwargs)
        if wanted is not None or not leaves:
            places = {torch.device(wanted or FIRST)}
        for place in places if func not in _CROSSING else ():
            self._label(_tensors(result), place)
        return result

    def _to(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        tensor, *rest = args
        if func is torch.Tensor.cpu:
            rest = [FIRST]
        if rest and isinstance(rest[0], torch.Tensor):
            device, dtype = self.place(rest[0]) or FIRST, rest[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*rest, **{k: v for k, v in kwargs.items() if k != "copy"})
        before = self.place(tensor)
        result: torch.Tensor = torch.Tensor.to(tensor, dtype or tensor.dtype, copy=kwargs.get("copy", False))
        if before is None or device is None or device == before:
            if before is not None or device is not None:
                self._label([result], before or device)
            return result
        moved: torch.Tensor = _Moved.apply(result, self, before, device)
        return moved


class _Moved(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, mode: TwoDevices, before: torch.device, after: torch.device
    ) -> torch.Tensor:
        ctx.mode, ctx.before = mode, before
        copied = tensor.clone()
        mode._label([copied], after)
        return copied

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        copied = gradients[0].clone()
        ctx.mode._label([copied], ctx.before)
        return copied, None, None, None
