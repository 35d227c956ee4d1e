"""FedSVD: refactoring loses nothing, keeps A's rows orthonormal, and works on factors of r alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.server.optimizers import server_optimizer
from fedlora.strategies.fedsvd import FedSVD, refactored
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.transport import PERSISTS
from tests import tiny
from tests.configs import override
from tests.llama_runs import LlamaRuns, adapter
from tests.small_runs import WEIGHTS, DrawnRounds

SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rounds(kind: str, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = DrawnRounds("fedsvd", kind, dtype)
    shapes: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def noted(matrix: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    for server_round in range(1, 5):
        before = {name: array.clone() for name, array in rounds.arrays.items()}
        sent, result = rounds.round(server_round)
        for arrays in sent:
            assert set(arrays) == {*rounds.adapted.names(["lora_B"]), *rounds.adapted.head_names}
        for path in rounds.adapted.adapters:
            b, a, old = result[f"{path}.lora_B"], result[f"{path}.lora_A"], before[f"{path}.lora_A"]
            for rows in (old, a):
                eye = torch.eye(3, dtype=rows.dtype)
                torch.testing.assert_close(rows @ rows.T, eye, rtol=0, atol=tolerance)
            mean = sum(p * arrays[f"{path}.lora_B"] for p, arrays in zip(SHARES, sent, strict=True))
            torch.testing.assert_close(b @ a, mean @ old, rtol=0, atol=10 * tolerance)
            # U S: orthogonal columns, of falling lengths.
            gram = b.T @ b
            largest = float(gram.max())
            torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=10 * tolerance * largest)
            assert (gram.diag().diff() <= 0).all()
            assert not torch.allclose(a, old, atol=1e-3), "A turns"
    assert set(shapes) == {(3, 3)}


@given(st.integers(1, 6), st.integers(0, 6), st.integers(6, 20), st.integers(6, 20), st.integers(0, 1000))
def test_refactoring_where_the_mean_lost_rank(r: int, kept: int, m: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kept = min(kept, r)
    b, a = draw(m, kept) @ draw(kept, r), torch.linalg.qr(draw(n, r))[0].T
    left, right = refactored(b, a)
    assert (left.shape, right.shape) == ((m, r), (r, n))
    torch.testing.assert_close(left @ right, b @ a, rtol=0, atol=1e-12 * max(1.0, float(b.norm())))
    torch.testing.assert_close(right @ right.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12)
    # It is completed from A's row space.
    torch.testing.assert_close(right @ a.T @ a, right, rtol=0, atol=1e-12)


def test_the_start_is_the_base_model_with_orthonormal_rows() -> None:
    rounds = DrawnRounds("fedsvd", "llama")
    drawn = [rounds.arrays[name] for name in rounds.adapted.names(["lora_A"])]
    for i, a in enumerate(drawn):
        torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
        assert not any(a.shape == other.shape and torch.equal(a, other) for other in drawn[:i])
    assert not any(rounds.arrays[name].any() for name in rounds.adapted.names(["lora_B"]))


STEPS: dict[str, Any] = {"optimizer": "sgd", "local_steps": 2, "learning_rate": 0.3, "batch_size": 3}
LOOKING_BACK: dict[str, dict[str, dict[str, Any]]] = {
    "fedavgm": {"server": {"optimizer": "fedavgm", "learning_rate": 0.7}},
    "scaffold": {"client": {"correction": "scaffold"}, "server": {"fraction_train": 0.5}},
    "momentum": {"client": {"momentum": 0.5, "keep_optimizer_state": True}, "server": {"fraction_train": 0.5}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("fedsvd"))


def run(runs: LlamaRuns, method: str, what: str, stop: int = 0) -> Any:
    back = LOOKING_BACK[what]
    return runs.run(
        stop=stop,
        run={"rounds": 4, "seed": 3},
        model={"dtype": "float64"},
        method={"name": method, "rank": 2, "alpha": 3.0},
        client=STEPS | back.get("client", {}),
        server=back["server"],
    )


def products(result: Any) -> dict[str, torch.Tensor]:
    """B A of every layer."""
    arrays = adapter(result)
    names = [name for name in arrays if "lora_A" in name]
    return {name: arrays[name.replace("lora_A", "lora_B")].double() @ arrays[name].double() for name in names}


@pytest.mark.parametrize("what", LOOKING_BACK)
def test_what_looks_back_is_carried_as_if_a_had_never_turned(
    runs: LlamaRuns, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFA-LoRA from the same orthonormal A: with gradient steps both take the same dW, since A keeps its row space."""
    monkeypatch.setattr(FFALoRA, "start_arrays", FedSVD.start_arrays)
    turning, still = run(runs, "fedsvd", what), products(run(runs, "ffa-lora", what))
    found, largest = products(turning), max(float(array.abs().max()) for array in still.values())
    assert largest > 1e-3
    assert tiny.difference(found, still) < 1e-6 * largest
    resumed = adapter(run(runs, "fedsvd", what, stop=2))
    assert all(torch.equal(array, resumed[name]) for name, array in adapter(turning).items())
    # Left in the coordinates of the round before, it leads elsewhere.
    monkeypatch.setattr(FedSVD, "transport", classmethod(lambda cls, kind: PERSISTS))
    assert tiny.difference(products(run(runs, "fedsvd", what)), still) > 1e-3 * largest


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_servers_momentum_is_that_of_the_products(kind: str) -> None:
    """M = beta M + (mean of the B_i A - W), W = W + eta M, whatever the clients send."""
    rounds, beta, eta = DrawnRounds("fedsvd", kind), 0.6, 0.7
    server = {"optimizer": "fedavgm", "momentum": beta, "learning_rate": eta}
    rounds.strategy.optimizer = server_optimizer(tiny.settings(kind, method={"name": "fedsvd"}, server=server))
    w: dict[str, Any] = {path: 0.0 for path in rounds.adapted.adapters}
    m = dict(w)
    for server_round in range(1, 6):
        before = {name: array.clone() for name, array in rounds.arrays.items()}
        sent, _ = rounds.round(server_round)
        for path in rounds.adapted.adapters:
            mean = sum(p * arrays[f"{path}.lora_B"] for p, arrays in zip(SHARES, sent, strict=True))
            m[path] = beta * m[path] + (mean @ before[f"{path}.lora_A"] - w[path])
            w[path] = w[path] + eta * m[path]
            found = rounds.arrays[f"{path}.lora_B"] @ rounds.arrays[f"{path}.lora_A"]
            torch.testing.assert_close(found, w[path], rtol=0, atol=1e-12 * max(1.0, float(w[path].abs().max())))


def test_a_step_that_is_not_finite_leaves_the_momentum_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = DrawnRounds("fedsvd", "llama")
    server = {"optimizer": "fedavgm"}
    optimizer = server_optimizer(tiny.settings("llama", method={"name": "fedsvd"}, server=server))
    rounds.strategy.optimizer = optimizer
    rounds.round(1)
    before = optimizer.state_dict()
    monkeypatch.setattr(optimizer, "step", lambda current, mean: {n: a * float("inf") for n, a in mean.items()})
    with pytest.raises(AssertionError):  # no arrays come of it
        rounds.round(2)
    assert rounds.strategy.report.uncounted == "the aggregate is not finite"
    after = optimizer.state_dict()
    for name, array in before["momentum_vector"].items():
        assert torch.equal(array, after["momentum_vector"][name])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"server": {"optimizer": "fedadam"}}, "server.optimizer"),
        ({"server": {"optimizer": "fedyogi"}}, "server.optimizer"),
        ({"client": {"optimizer": "adamw", "keep_optimizer_state": True}}, "client.keep_optimizer_state"),
    ],
)
def test_second_moments_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=rf"{key} = .*second moment"):
        load_config(override("method", {"name": "fedsvd"}) | values)
