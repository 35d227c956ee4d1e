"""Where a model is: on one device, or split by layers over several GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.config import Config

Placement = str | torch.device | Sequence[str | torch.device]
"""A device, or the devices over which a model is split."""

KEY = "simulation.gpus_per_worker"

Model = TypeVar("Model", bound=nn.Module)


def cards_of(device: Placement) -> tuple[torch.device, ...]:
    """Return the devices of a placement, each GPU with its number."""
    given = (device,) if isinstance(device, str | torch.device) else device
    found = (torch.device(one) for one in given)
    return tuple(torch.device("cuda", one.index or 0) if one.type == "cuda" else one for one in found)


def gpus(config: Config) -> tuple[torch.device, ...]:
    """Return the GPUs that a worker's model is on: the first ``simulation.gpus_per_worker``, at least one.

    A process that sees fewer uses those; one that sees none, the CPU.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        return (torch.device("cpu"),)
    wanted = max(1, int(config.simulation.gpus_per_worker))
    return tuple(torch.device("cuda", number) for number in range(min(there, wanted)))


def split_by_layers(skeleton: nn.Module, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Divide a model over devices at its layers, so that each gets about as many parameters.

    The layers are the members of the longest ModuleList. What comes before them is on the first device, what comes
    after them on the last. On the first are also modules without weights, and those that share weights with an earlier
    one, as an output layer with the embeddings.

    Parameters
    ----------
    skeleton : torch.nn.Module
    devices : sequence of torch.device

    Returns
    -------
    dict of str to torch.device
        By path of a module or parameter: a ``device_map`` of transformers.

    Raises
    ------
    InputError
        If the model has fewer layers than there are devices.
    """
    lists = {path: module for path, module in skeleton.named_modules() if isinstance(module, nn.ModuleList)}
    layers = max(lists, key=lambda path: len(lists[path]), default="")
    if not layers or len(lists[layers]) < len(devices):
        remedy = f"{type(skeleton).__name__} has no list of so many layers, over which it could be split; lower it"
        raise InputError(KEY, len(devices), remedy)
    last, total = len(devices) - 1, sum(p.numel() for p in skeleton.parameters())
    places: dict[str, torch.device] = {}
    seen: set[int] = set()
    before, behind = 0, False
    for path, parameters in _pieces(skeleton, layers):
        new = [p for p in parameters if id(p) not in seen]
        size = sum(p.numel() for p in new)
        if path.startswith(f"{layers}."):
            behind = True
            number = min(last, int((before + size / 2) / total * len(devices)))
        else:
            number = last if behind and new and len(new) == len(parameters) else 0
        places[path] = devices[number]
        before += size
        seen |= set(map(id, new))
    return places


def _pieces(module: nn.Module, layers: str, path: str = "") -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield the paths of what is not divided, in order, with its parameters: layers, and all beside their list."""
    start = f"{path}." if path else ""
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{start}{name}", [parameter]
    for name, child in module.named_children():
        here = f"{start}{name}"
        if f"{layers}.".startswith(f"{here}."):
            yield from _pieces(child, layers, here)
        else:
            yield here, list(child.parameters())


def move_inputs(model: Model) -> Model:
    """Let each part of a model that is split over devices move its inputs to its own device; return the model.

    A part is the largest module whose weights are all on one device. Modules may have been replaced since the last
    call. A model on one device is left without hooks.
    """
    for module in model.modules():
        for number in [number for number, hook in module._forward_pre_hooks.items() if hook is _move]:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
    if len(devices_of(model)) > 1:
        for part in _parts(model):
            part.register_forward_pre_hook(_move, with_kwargs=True)
    return model


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices of a model's weights and buffers, in the order of the model."""
    return list(dict.fromkeys(tensor.device for tensor in _tensors(model)))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    if len(devices_of(module)) == 1:
        yield module
    else:
        for child in module.children():
            yield from _parts(child)


def _move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    # Looked up at every pass: the weights may have been moved in the meantime.
    device = next(_tensors(module)).device
    return _moved(args, device), _moved(kwargs, device)


def _moved(given: Any, device: torch.device) -> Any:
    """Move the tensors of nested tuples, lists and dicts; leave all else, such as a cache of keys and values."""
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if type(given) in (tuple, list):
        return type(given)(_moved(one, device) for one in given)
    if type(given) is dict:
        return {name: _moved(one, device) for name, one in given.items()}
    return given


def without_accelerate(model: Model) -> Model:
    """Take accelerate's hooks off a model that transformers split, and return it.

    They replace the ``forward`` of every layer, also of those in whose place adapters are put.
    """
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        vars(module).pop("forward", None)  # the class's own, bound
    return model
