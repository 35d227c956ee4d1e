"""FedEx-LoRA: its residual makes the mean exact, at a small rank; who missed rounds gets what it lacks."""

from __future__ import annotations

import pytest
import torch

from fedlora.adapters.model import linear_shape
from fedlora.arrays import Arrays
from fedlora.communication.parts import Chain, residual_sum
from fedlora.roles import kind_of
from fedlora.strategies.base import Contact
from tests.small_runs import WEIGHTS, DrawnRounds


def numbers(arrays: Arrays) -> int:
    return sum(array.numel() for array in arrays.values())


def increment(result: Arrays) -> Arrays:
    return {name: array for name, array in result.items() if kind_of(name, ()).startswith("residual")}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("rank", [2, 3, 12])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_residual_makes_every_round_exact(kind: str, rank: int, dtype: str, tolerance: float) -> None:
    rounds = DrawnRounds("fedex-lora", kind, dtype, rank=rank)
    total: Arrays = {}
    for server_round, answering in enumerate([(0, 1, 2), (0, 2), (1,)], 1):
        before = total
        sent, result = rounds.round(server_round, answering)
        weights = [WEIGHTS[client] for client in answering]
        added = increment(result)
        total = residual_sum(total, added)
        assert bool(added) == (len(answering) > 1)
        for path, adapter in rounds.adapted.adapters.items():
            m, n = linear_shape(adapter.base)
            ideal = sum(
                w / sum(weights) * adapter.scaling * arrays[f"{path}.lora_B"] @ arrays[f"{path}.lora_A"]
                for w, arrays in zip(weights, sent, strict=True)
            )
            assert isinstance(ideal, torch.Tensor)
            mean = adapter.scaling * result[f"{path}.lora_B"] @ result[f"{path}.lora_A"]
            here = total.get(path, torch.zeros(m, n)) - before.get(path, torch.zeros(m, n))
            largest = max(1.0, float(ideal.abs().max()), float(total.get(path, ideal).abs().max()))
            torch.testing.assert_close(here + mean, ideal, rtol=0, atol=tolerance * largest)
            if len(answering) == 1:
                continue
            assert (ideal - mean).norm() > 1e-2 * ideal.norm(), "FedIT alone misses it"
            # Of rank (c - 1) r, as factors where these are smaller.
            allowed = (len(answering) - 1) * rank
            assert torch.linalg.matrix_rank(here.double(), rtol=1e-4) <= allowed
            small = allowed * (m + n) <= m * n
            found = {
                name.rpartition(".")[2]: tuple(a.shape) for name, a in added.items() if name.startswith(f"{path}.")
            }
            factors = {"residual_B": (m, allowed), "residual_A": (allowed, n)}
            assert found == (factors if small else {"residual": (m, n)})


def test_a_client_without_examples_does_not_spoil_it() -> None:
    rounds = DrawnRounds("fedex-lora")
    rounds.strategy.examples = {0: 0, 1: 5, 2: 3}
    sent, result = rounds.round(1)
    total = residual_sum({}, increment(result))
    for path, adapter in rounds.adapted.adapters.items():
        products = [arrays[f"{path}.lora_B"] @ arrays[f"{path}.lora_A"] for arrays in sent]
        ideal = adapter.scaling * (5 * products[1] + 3 * products[2]) / 8
        got = total[path] + adapter.scaling * result[f"{path}.lora_B"] @ result[f"{path}.lora_A"]
        torch.testing.assert_close(got, ideal, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 4, 12])
def test_the_formula_is_what_a_chain_sends(rank: int) -> None:
    """Increments since a client's version, or their sum where that is smaller; whatever rounds it missed."""
    rounds = DrawnRounds("fedex-lora", rank=rank)
    sizes = rounds.strategy.sizes(rounds.adapted)
    shapes = [linear_shape(adapter.base) for adapter in rounds.adapted.adapters.values()]
    both = sum(rank * (m + n) for m, n in shapes) + 3 * 32 + 3
    whole = sum(m * n for m, n in shapes)
    chain = Chain("key")
    versions, replied = {1: ""}, {}
    seen = set()
    for server_round, answering in enumerate([(0, 1, 2), (0, 2), (1,), (0, 1, 2), (1, 2)], 1):
        for since in [None, *range(1, server_round)]:
            held = "" if since is None else versions[since]
            sent = chain.since(held).numbers if chain.version not in ("", held) else 0
            found = rounds.strategy.payload(sizes, Contact(server_round, 0, since, replied))
            assert (found.initial, found.down, found.up) == (0, both + sent, both)
            seen.add("none" if sent == 0 else "sum" if sent == whole else "increments")
        _, result = rounds.round(server_round, answering)
        if added := increment(result):
            chain.add(server_round, added)
        replied[server_round] = list(answering)
        versions[server_round + 1] = chain.version
    assert seen == {"none", "increments", "sum"} if rank == 4 else "none" in seen
