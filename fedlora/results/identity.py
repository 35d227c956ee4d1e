"""Check that a resumed run has the examples and base model it began with, and note changed packages."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fedlora.adapters.model import AdaptedModel
from fedlora.adapters.stacked import StackedLinear
from fedlora.config import NODES, Config
from fedlora.data.tokens import FederatedData, TokenTable
from fedlora.errors import InputError
from fedlora.results.folder import RunFolder

log = logging.getLogger("fedlora")

_PART = 2**23
"""Bytes that a thread hashes at once, so that no core hashes the embeddings of a large vocabulary alone."""

_thread = threading.local()

_PARTS = {
    "labels": "the classes are",
    "train": "the training examples are",
    "test": "the test examples are",
    "validation": "the validation examples are",
    "public": "the public examples are",
    "partition": "which client holds which examples is",
}


def check_data(folder: RunFolder, config: Config, data: FederatedData) -> None:
    """Record the digests of a new run's examples; refuse to resume with others.

    The digests cover what the model reads: the tokens, labels and domains of every split, and the partition. Touching,
    copying or moving a file changes nothing.

    Raises
    ------
    InputError
        Naming what differs.
    """
    found = data_digests(data)
    before: Mapping[str, str] | None = folder.checkpoint.get("data")
    if before is None:
        folder.checkpoint["data"] = found
        return
    for part, what in _PARTS.items():
        if before.get(part) != found.get(part):
            given = getattr(config.data, part, None)
            own = isinstance(given, str) or (config.data.name == NODES and given is not None)
            field, value = (f"data.{part}", given) if own else ("data.name", config.data.name)
            remedy = (
                f"{what} not as when the run began; bring back the data (or the model's tokenizer) as it was, or run "
                f"anew with another --output (read now: {data.folder})"
            )
            raise InputError(field, value, remedy)


def check_model(folder: RunFolder, config: Config, adapted: AdaptedModel) -> None:
    """Record the digest of a new run's base model; refuse to resume with another.

    Raises
    ------
    InputError
    """
    found = hashlib.sha256(repr(sorted(weight_digests(adapted).items())).encode()).hexdigest()
    before = folder.checkpoint.get("model")
    if before is None:
        folder.checkpoint["model"] = found
    elif before != found:
        remedy = "its weights are not as when the run began; bring them back, or run anew with another --output"
        raise InputError("model.name", config.model.name, remedy)


def note_environment(folder: RunFolder, environment: Mapping[str, Any]) -> None:
    """Record a run's packages and machine; on resume, note differences, which may change the last bits."""
    now = {**environment["versions"], **{name: environment[name] for name in ("python", "processor", "gpu")}}
    before: Mapping[str, Any] = folder.checkpoint.get("environment", now)
    folder.checkpoint["environment"] = now
    changed = [
        f"{name} was {before.get(name)} when the run began and is {now[name]} now"
        for name in now
        if before.get(name) != now[name]
    ]
    if changed:
        folder.tell(f"{'; '.join(changed)}; the last bits may differ")


def data_digests(data: FederatedData) -> dict[str, str]:
    """SHA-256 of every split, of the classes and of the partition."""
    tables = {"train": data.train, "test": data.test, "validation": data.validation, "public": data.public}
    found = {name: _table_digest(table) for name, table in tables.items() if table is not None}
    found["labels"] = hashlib.sha256(repr((data.label_names, data.domain_names)).encode()).hexdigest()
    names = repr(data.client_names).encode()
    found["partition"] = _array_digest(data.partition.rows, data.partition.offsets, extra=names)
    return found


def weight_digests(adapted: AdaptedModel) -> dict[str, str]:
    """SHA-256 of each of a base model's weights, by its name in the model; computed when it is first asked for."""
    if not adapted.digests:
        adapted.digests = hash_weights(adapted)()
    return adapted.digests


def hash_weights(adapted: AdaptedModel) -> Callable[[], dict[str, str]]:
    """Begin to hash all weights of a base model as they are now, without the trained ones.

    The weights in memory are hashed, not a file's size and time of change, which would miss a bit that the disk lost.
    One thread a core hashes 0.3 to 1.5 GB a second, beside what else is done meanwhile.

    Parameters
    ----------
    adapted : AdaptedModel
        Other tensors may take the place of its parameters at once. The parameters may not change before the end.

    Returns
    -------
    callable () -> dict of str to str
        Waits for the end; returns the SHA-256 of each weight, by its name in the model.
    """
    model = adapted.model
    trained = {f"{path}." for path, module in model.named_modules() if isinstance(module, StackedLinear)}
    parameters = {t.data_ptr() for t in model.parameters()}
    state = {
        # A pass over the model may change buffers.
        name: tensor if tensor.data_ptr() in parameters else tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(path) for path in trained)
    }
    parts = {_place(t): t.detach().reshape(-1).view(torch.uint8).split(_PART) for t in state.values()}  # tied ones once
    streams = {
        device: torch.cuda.Stream(device) for device in {t.device for t in state.values()} if device.type == "cuda"
    }
    for device, stream in streams.items():
        stream.wait_stream(torch.cuda.current_stream(device))
    pool = ThreadPoolExecutor(os.cpu_count())
    hashed = {place: [pool.submit(_part_digest, part, streams) for part in split] for place, split in parts.items()}
    pool.shutdown(wait=False)

    def digests() -> dict[str, str]:
        found = {place: b"".join(part.result() for part in split) for place, split in hashed.items()}
        return {name: _tensor_digest(tensor, found[_place(tensor)]) for name, tensor in state.items()}

    return digests


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _part_digest(part: torch.Tensor, streams: Mapping[torch.device, torch.cuda.Stream]) -> bytes:
    """Hash some bytes; those of a GPU by a buffer of this thread, since fresh memory costs more than the copy."""
    if part.device in streams:
        if not hasattr(_thread, "buffer"):
            _thread.buffer = torch.empty(_PART, dtype=torch.uint8)
        with torch.cuda.stream(streams[part.device]):
            part = _thread.buffer[: len(part)].copy_(part)
    return hashlib.sha256(part.numpy().data).digest()


def _tensor_digest(tensor: torch.Tensor, parts: bytes) -> str:
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + parts).hexdigest()


def _table_digest(table: TokenTable) -> str:
    arrays = [table.tokens, table.offsets, table.labels, table.answer_start, table.domain]
    if table.task.causal and table.tags is not None:
        arrays.append(table.tags)  # which tokens of a conversation are learnt
    return _array_digest(*arrays, extra=repr(table.pad_token_id).encode())


def _array_digest(*arrays: np.ndarray | None, extra: bytes = b"") -> str:
    sha = hashlib.sha256(extra)
    for array in arrays:
        if array is None:
            sha.update(b"\nnone")
            continue
        sha.update(f"\n{array.dtype} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
