"""The singular vectors of the frozen weights, from which some methods start; kept in the cache where that pays."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlora.adapters import AdaptedModel
from fedlora.adapters.model import dense_weight, linear_shape
from fedlora.adapters.parameterisations.sb import leading_pairs
from fedlora.alignment import aligned
from fedlora.arrays import Arrays
from fedlora.assets import build_once, cache_dir
from fedlora.results.identity import weight_digests
from fedlora.svd import VERSION, TruncatedSVD, is_large

log = logging.getLogger("fedlora")

_ARRAYS, _DIGEST = "pairs.safetensors", "pairs.sha256"


def weight_svd(adapted: AdaptedModel, rank: int) -> dict[str, TruncatedSVD]:
    """Return the leading singular values and vectors of every adapted layer's W0, by module path.

    Those of a model with large weights lie in the cache, under a digest of the weights, the rank and all else that
    their bits depend on. What was changed there since is computed again.

    Parameters
    ----------
    adapted : AdaptedModel
    rank : int
        At most the smallest size of a layer.

    Raises
    ------
    InputError
        If the cache cannot be written.
    """
    layers = {path: adapter.base for path, adapter in adapted.adapters.items()}
    large = [path for path, layer in layers.items() if is_large(linear_shape(layer))]
    if not large:
        return {path: leading_pairs(dense_weight(layer), rank) for path, layer in layers.items()}
    folder = cache_dir() / "svd" / _key(adapted, rank)
    if folder.is_dir() and not _is_whole(folder):
        log.warning("%s was changed or is cut short; its content is computed again", folder)
        shutil.rmtree(folder)
    build_once(folder, lambda target: _write(layers, rank, target), "method.init", "svd")
    found = _read(folder, list(layers))
    error = max(found[path].error for path in large)
    told = "the start's SVD of %d large weights has singular values within %.1e of each weight's largest; in %s"
    log.info(told, len(large), error, folder)
    return found


def _key(adapted: AdaptedModel, rank: int) -> str:
    digests = weight_digests(adapted)
    parts = {
        "version": VERSION,
        "rank": rank,
        "weights": {path: [digests[n] for n in digests if n.startswith(f"{path}.base.")] for path in adapted.adapters},
        # The last bits depend on these.
        "torch": torch.__version__,
        "device": adapted.device.type,
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(layers: Mapping[str, nn.Module], rank: int, target: Path) -> None:
    arrays: Arrays = {}
    for path, layer in layers.items():
        pairs = leading_pairs(dense_weight(layer), rank)
        error = torch.tensor(pairs.error, dtype=torch.float64)
        arrays |= {f"{path}.u": pairs.u, f"{path}.s": pairs.s, f"{path}.vh": pairs.vh, f"{path}.error": error}
    save_file(arrays, target / _ARRAYS)
    (target / _DIGEST).write_text(_digest(target / _ARRAYS), encoding="utf-8")


def _read(folder: Path, paths: list[str]) -> dict[str, TruncatedSVD]:
    arrays = {name: aligned(array) for name, array in load_file(folder / _ARRAYS).items()}
    return {
        path: TruncatedSVD(
            u=arrays[f"{path}.u"], s=arrays[f"{path}.s"], vh=arrays[f"{path}.vh"], error=float(arrays[f"{path}.error"])
        )
        for path in paths
    }


def _is_whole(folder: Path) -> bool:
    try:
        return _digest(folder / _ARRAYS) == (folder / _DIGEST).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
