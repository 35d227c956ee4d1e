"""HetLoRA: factors weighted by the norm of the clients' updates; with equal norms it is FedIT."""

from __future__ import annotations

import pytest
import torch

from fedlora.arrays import Arrays
from fedlora.strategies.replies import ReplyError
from fedlora.strategies.updates import Update, Updates, product_norm
from tests.small_runs import WEIGHTS, DrawnRounds


def of(rounds: DrawnRounds, answers: list[Arrays]) -> Arrays:
    """Return what the server makes of answers, with the weights of the clients."""
    shapes = rounds.strategy.client_shapes(0)
    vectors = [torch.cat([arrays[name].reshape(-1) for name in shapes]) for arrays in answers]
    updates = [Update(k, WEIGHTS[k], vector, shapes) for k, vector in enumerate(vectors)]
    made = rounds.strategy.aggregate(Updates(iter(updates)))
    assert made is not None
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_weights_are_examples_times_norms(kind: str, dtype: str, tolerance: float) -> None:
    rounds = DrawnRounds("hetlora", kind, dtype)
    for server_round in (1, 2):
        sent, result = rounds.round(server_round)
        paths = list(rounds.adapted.adapters)
        norms = [sum((a[f"{p}.lora_B"] @ a[f"{p}.lora_A"]).square().sum() for p in paths) ** 0.5 for a in sent]
        weights = [float(w * norm) for w, norm in zip(WEIGHTS, norms, strict=True)]
        for name, array in result.items():
            used = WEIGHTS if name in rounds.adapted.head_names else weights
            mean = sum(w * a[name] for w, a in zip(used, sent, strict=True)) / sum(used)
            torch.testing.assert_close(array, mean, rtol=0, atol=tolerance * max(1.0, float(array.abs().max())))


def test_with_equal_norms_it_is_plain_averaging() -> None:
    here, plain = DrawnRounds("hetlora"), DrawnRounds("fedit")
    sent, _ = here.round(1)
    plain.round(1)
    paths = list(here.adapted.adapters)
    for arrays in sent:
        norm = sum((arrays[f"{p}.lora_B"] @ arrays[f"{p}.lora_A"]).square().sum() for p in paths) ** 0.5
        for path in paths:
            arrays[f"{path}.lora_B"] = arrays[f"{path}.lora_B"] / norm
    first, second = of(here, sent), of(plain, sent)
    assert first.keys() == second.keys()
    for name, array in first.items():
        torch.testing.assert_close(array, second[name], rtol=0, atol=1e-12)


def test_clients_that_did_not_move_are_averaged_by_their_examples() -> None:
    rounds = DrawnRounds("hetlora")
    sent, _ = rounds.round(1)
    still = [{n: torch.zeros_like(a) if n.endswith("lora_B") else a for n, a in arrays.items()} for arrays in sent]
    made = of(rounds, still)
    for name in rounds.adapted.names(["lora_A"]):
        mean = sum(w * a[name] for w, a in zip(WEIGHTS, sent, strict=True)) / sum(WEIGHTS)
        torch.testing.assert_close(made[name], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
def test_factors_whose_product_is_not_finite_are_refused(name: str) -> None:
    """Their norm could not be a weight, and their SVD would end the run."""
    rounds = DrawnRounds(name)
    rounds.strategy.enter(1, 1)
    shapes = rounds.strategy.client_shapes(0)
    ones = torch.ones(sum(torch.Size(shape).numel() for shape in shapes.values()), dtype=torch.float64)
    rounds.strategy.check_update(Update(0, 1.0, 1e60 * ones, shapes))
    with pytest.raises(ReplyError, match="not finite"):
        rounds.strategy.check_update(Update(0, 1.0, 1e200 * ones, shapes))


def test_norms_from_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    for m, r, n in ((5, 2, 9), (3, 7, 4), (1, 1, 1)):
        b, a = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, r), (r, n)))
        assert product_norm(b, a) == pytest.approx(float((b @ a).norm()), rel=1e-12)
