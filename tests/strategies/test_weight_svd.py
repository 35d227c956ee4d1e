"""The start from the weights' singular vectors: kept in the cache, and never read from it changed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import svd
from fedlora.adapters import AdaptedModel
from fedlora.adapters.model import dense_weight
from fedlora.strategies import weight_svd as module
from fedlora.strategies.weight_svd import weight_svd
from fedlora.svd import TruncatedSVD
from tests import tiny

RANK = 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every weight is large here."""
    monkeypatch.setattr(svd, "SMALL", 0)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks of the decompositions that are computed."""
    ranks: list[int] = []
    compute = module.leading_pairs

    def noted(weight: torch.Tensor, rank: int) -> TruncatedSVD:
        ranks.append(rank)
        return compute(weight, rank)

    monkeypatch.setattr(module, "leading_pairs", noted)
    return ranks


def model(kind: str = "gpt2", **method: Any) -> AdaptedModel:
    config = tiny.settings(kind, method={"name": "fed-sb", "rank": RANK, "target_modules": "all-linear", **method})
    adapted: AdaptedModel = tiny.adapted_model(kind, config)
    return adapted


def same(first: dict[str, TruncatedSVD], second: dict[str, TruncatedSVD]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[path].u, second[path].u)
        and torch.equal(first[path].s, second[path].s)
        and torch.equal(first[path].vh, second[path].vh)
        and first[path].error == second[path].error
        for path in first
    )


def test_what_was_computed_is_read_again(cache: Path, computed: list[int]) -> None:
    first = weight_svd(model(), RANK)
    layers = len(first)
    assert len(computed) == layers > 1
    for path, adapter in model().adapters.items():
        w = dense_weight(adapter.base)
        assert 0 <= first[path].error < 0.1
        torch.testing.assert_close(first[path].u.T @ w @ first[path].vh.T, torch.diag(first[path].s), atol=1e-5, rtol=0)
        values = torch.linalg.svdvals(w)
        assert float((values[:RANK] - first[path].s).abs().max()) <= first[path].error * float(values[0]) + 1e-6
    assert same(weight_svd(model(), RANK), first)
    assert len(computed) == layers
    assert len(list((cache / "svd").glob("[!.]*"))) == 1


def test_another_rank_or_weight_is_another_start(computed: list[int]) -> None:
    first = weight_svd(model(), RANK)
    layers = len(first)
    weight_svd(model(), RANK - 1)
    assert computed == [RANK] * layers + [RANK - 1] * layers
    changed = model()
    path, adapter = next(iter(changed.adapters.items()))
    with torch.no_grad():
        adapter.base.weight[0, 0] += 1.0
    assert not torch.equal(weight_svd(changed, RANK)[path].u, first[path].u)
    assert len(computed) == 3 * layers


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "no digest"])
def test_a_damaged_one_is_computed_again(
    damage: str, cache: Path, computed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = weight_svd(model(), RANK)
    (folder,) = (cache / "svd").glob("[!.]*")
    arrays, digest = folder / "pairs.safetensors", folder / "pairs.sha256"
    content = bytearray(arrays.read_bytes())
    if damage == "changed":
        content[-1] ^= 1
        arrays.write_bytes(content)
    elif damage == "cut":
        arrays.write_bytes(content[:100])
    else:
        (arrays if damage == "gone" else digest).unlink()
    with caplog.at_level(logging.WARNING, "fedlora"):
        again = weight_svd(model(), RANK)
    assert same(first, again)
    assert len(computed) == 2 * len(first)
    assert "computed again" in caplog.text
    assert same(weight_svd(model(), RANK), first)
    assert len(computed) == 2 * len(first)


def test_small_weights_leave_no_trace_on_disk(
    cache: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "SMALL", 2**20)
    found = weight_svd(model(), RANK)
    assert {pairs.error for pairs in found.values()} == {0.0}
    assert len(computed) == len(found)
    assert not (cache / "svd").exists()
