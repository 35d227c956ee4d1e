"""RoLoRA: one factor's bytes a round, and exact in each."""

from __future__ import annotations

import pytest
import torch

from fedlora.adapters.model import linear_shape
from fedlora.strategies.base import Contact, Payload
from tests.small_runs import WEIGHTS, DrawnRounds

SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_one_factor_a_round_and_the_mean_is_exact(kind: str, dtype: str, tolerance: float) -> None:
    rounds = DrawnRounds("rolora", kind, dtype)
    for server_round, (trained, waiting) in enumerate([("lora_B", "lora_A"), ("lora_A", "lora_B")] * 2, 1):
        before = rounds.arrays
        before = {name: array.clone() for name, array in before.items()}
        sent, result = rounds.round(server_round)
        head = set(rounds.adapted.head_names)
        for arrays in sent:
            assert set(arrays) == {*rounds.adapted.names([trained]), *head}
        for path, adapter in rounds.adapted.adapters.items():
            still, moved = f"{path}.{waiting}", f"{path}.{trained}"
            assert torch.equal(result[still], before[still])
            products = [
                adapter.scaling
                * (arrays[moved] @ before[still] if trained == "lora_B" else before[still] @ arrays[moved])
                for arrays in sent
            ]
            ideal = sum(p * each for p, each in zip(SHARES, products, strict=True))
            got = adapter.scaling * result[f"{path}.lora_B"] @ result[f"{path}.lora_A"]
            torch.testing.assert_close(got, ideal, rtol=0, atol=tolerance * max(1.0, float(ideal.abs().max())))


def test_bytes() -> None:
    """B in odd rounds and A in even ones; down what is stale; the start of either once."""
    rounds = DrawnRounds("rolora")
    sizes = rounds.strategy.sizes(rounds.adapted)
    shapes = [linear_shape(adapter.base) for adapter in rounds.adapted.adapters.values()]
    b, a = sum(3 * m for m, _ in shapes), sum(3 * n for _, n in shapes)
    head = 3 * 32 + 3
    replied = {r: [0] for r in (1, 2, 4, 5)}  # the third did not count

    def payload(server_round: int, since: int | None, without: int = 0) -> Payload:
        known = {r: clients for r, clients in replied.items() if r < server_round and r != without}
        return rounds.strategy.payload(sizes, Contact(server_round, 1, since, known))

    assert payload(1, None) == Payload(a + b, head, b + head)
    assert payload(2, 1) == Payload(0, b + head, a + head)
    assert payload(2, None) == Payload(a, b + head, a + head)
    assert payload(3, 2) == Payload(0, a + head, b + head)
    assert payload(3, 1) == Payload(0, a + b + head, b + head)
    assert payload(4, 3) == Payload(0, head, a + head)
    assert payload(5, 3) == Payload(0, a + head, b + head)
    assert payload(6, 4) == payload(6, 3) == payload(6, None) == Payload(0, a + b + head, a + head)
    # B is 0 where the first round did not count: the second does not move A.
    assert payload(3, 2, without=1) == Payload(0, head, b + head)
    assert payload(5, 3, without=1) == Payload(0, head, b + head)
    assert payload(3, None, without=1) == Payload(a + b, head, b + head)
