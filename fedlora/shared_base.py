"""One copy of a base model's frozen weights for all models of a process, and for all processes of a GPU.

The server's model and a client's are two models on one base: only their adapters differ. In a process the second of
them is a copy of the first's structure that uses the same weights. Processes on one GPU use the weights of the one that
loaded them, through CUDA's handles of memory (:func:`lend` and :func:`borrow`); a process that cannot loads its own.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import reduce_tensor

from fedlora.config import Config
from fedlora.devices import Placement, cards_of, devices_of
from fedlora.kernels.rotary import use_rotary_kernel
from fedlora.models import load_base, pretrained_source
from fedlora.timeline import phase

log = logging.getLogger("fedlora")

_originals: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
"""Base models as they were loaded, for as long as a copy of them is in use."""

_lent: weakref.WeakKeyDictionary[nn.Module, Loan | None] = weakref.WeakKeyDictionary()
"""What this process lends of them; None of those that it cannot."""

_loans: dict[str, Loan] = {}
"""What other processes lend to this one."""


@dataclass(frozen=True)
class Loan:
    """A base model that another process may use without loading it.

    Attributes
    ----------
    key : str
        Which model it is.
    cards : tuple of str
        UUIDs of the GPUs that hold it, in the order of their numbers.
    pickled : bytes
        The model, with handles in the place of its weights.
    counters : tuple of (bytes, int)
        Where torch counts who uses the weights.
    """

    key: str
    cards: tuple[str, ...]
    pickled: bytes
    counters: tuple[tuple[bytes, int], ...]


class _Held:
    """A model that lives as long as its copies. Copies of these hold the same one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


def shared_base(config: Config, label_names: list[str] | None, device: Placement = "cpu") -> nn.Module:
    """Return a base model as :func:`fedlora.models.load_base` does; all that are equal have their weights in common.

    Weights of a base must not be changed in place. Buffers are each model's own.

    Parameters
    ----------
    config : Config
    label_names : list of str, optional
    device : str, torch.device or sequence of these

    Raises
    ------
    InputError
        As of ``load_base``.
    """
    # A layer of int8 moves its weight at its first pass.
    if cards_of(device)[0].type == "meta" or config.model.quantization == "int8":
        return load_base(config, label_names, device)
    key = _key(config, label_names, device)
    original = _originals.get(key)
    if original is None:
        original = _borrowed(key)
    if original is None:
        with phase("weights", "reading the weights"):
            original = load_base(config, label_names, device)
    _originals[key] = original
    return _copy(original)


def _key(config: Config, label_names: list[str] | None, device: Placement) -> str:
    """Name a base model: equal names, equal weights in equal places."""
    source = Path(pretrained_source(config))
    files = sorted(source.iterdir()) if source.is_dir() else []
    # A folder may hold another model by now.
    there = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    cards = [str(card) for card in cards_of(device)]
    return repr((config.model.model_dump_json(), config.run.seed, label_names, cards, str(source), there))


def _copy(original: nn.Module) -> nn.Module:
    """Return a model of the same weights, whose modules and buffers are its own."""
    memo: dict[int, Any] = {}
    for parameter in original.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        else:  # bitsandbytes' of 4 bits
            memo[id(parameter)] = parameter
            memo[id(getattr(parameter, "quant_state", None))] = getattr(parameter, "quant_state", None)
    made = copy.deepcopy(original, memo)
    vars(made)["original"] = _Held(original)  # not a submodule
    return made


def lend() -> list[Loan]:
    """Return the base models of this process that are on GPUs, for :func:`borrow` in others on the same ones."""
    for key, original in list(_originals.items()):
        cards = devices_of(original)
        if original not in _lent and all(card.type == "cuda" for card in cards):
            _lent[original] = _loan(key, original, 1 + max(card.index for card in cards))
    return [loan for loan in _lent.values() if loan is not None]


def _loan(key: str, original: nn.Module, cards: int) -> Loan | None:
    try:
        pickled, counters = pickle_shared(original)
    except Exception as error:  # of CUDA, or of a model that cannot be pickled
        log.info("every worker loads a base model of its own: this process cannot lend it (%s)", error)
        return None
    return Loan(key, tuple(map(_uuid, range(cards))), pickled, counters)


def borrow(loans: Iterable[Loan]) -> None:
    """Use models that another process lends, where they are on this process' GPUs."""
    there = [_uuid(card) for card in range(torch.cuda.device_count())]
    _loans.update({loan.key: loan for loan in loans if list(loan.cards) == there[: len(loan.cards)]})


def end_loans(loans: Iterable[Loan]) -> None:
    """Let the memory of loans go with their models, once the processes that borrowed them have ended.

    A process that is killed does not tell torch that it uses them no more.
    """
    for loan in loans:
        for handle, offset in loan.counters:
            torch.UntypedStorage._release_ipc_counter_cuda(handle, offset)
    torch.cuda.ipc_collect()


def _borrowed(key: str) -> nn.Module | None:
    loan = _loans.get(key)
    if loan is None:
        return None
    try:
        model: nn.Module = pickle.loads(loan.pickled)
        use_rotary_kernel(model)  # which is in the code of a process, and not in a model
    except Exception as error:  # of CUDA
        log.warning("a base model that another process lends cannot be used, so it is loaded again (%s)", error)
        return None
    return model


def _uuid(card: int) -> str:
    return str(torch.cuda.get_device_properties(card).uuid)


class _Pickler(ForkingPickler):
    """Writes handles of tensors' memory in the place of their numbers."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.counters: list[tuple[bytes, int]] = []

    def reducer_override(self, given: Any) -> Any:
        if type(given) not in (torch.Tensor, nn.Parameter):
            return NotImplemented
        rebuild, arguments = reduce_tensor(given)
        if given.is_cuda:
            self.counters.append(arguments[11:13])  # as rebuild_cuda_tensor names them
        return rebuild, arguments


def pickle_shared(model: nn.Module) -> tuple[bytes, tuple[tuple[bytes, int], ...]]:
    """Pickle a model whose tensors another process of this machine will share; return torch's counters of users too."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(model)
    return file.getvalue(), tuple(pickler.counters)
