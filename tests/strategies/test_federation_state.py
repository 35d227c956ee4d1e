"""What a run keeps over its rounds and restarts, beside the arrays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.strategies.base import FederatedStrategy
from fedlora.strategies.fedex_lora import FedExLoRA
from tests.llama_runs import LlamaRuns, adapter, payload, table

SECTIONS: dict[str, dict[str, Any]] = {"run": {"rounds": 3, "seed": 3}, "method": {"name": "fedex-lora", "rank": 1}}


class SameRounds(FederatedStrategy):
    """Runs the rounds of FedEx-LoRA, but is no subclass of it."""

    name, title, paper = "same-rounds", "The rounds of another method", "none"
    learning_rates = FedExLoRA.learning_rates
    roles = classmethod(lambda cls, config, server_round: FedExLoRA.roles(config, server_round))
    start_arrays, payload = FedExLoRA.start_arrays, FedExLoRA.payload
    aggregate, _residual = FedExLoRA.aggregate, FedExLoRA._residual


class Forgetful(FedExLoRA):
    """Keeps a tensor for the second round alone."""

    name = "forgetful"
    restored: bool | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.memory = {"x": torch.ones(2)}

    def aggregate(self, updates: Any) -> Any:
        self.memory = {} if self.replied else self.memory
        return super().aggregate(updates)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def load_state_dict(self, state: Any) -> None:
        type(self).restored = bool(state["memory"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("state"))


def strategy(runs: LlamaRuns, kind: type[FederatedStrategy]) -> Any:
    return lambda: kind(runs.config(**SECTIONS))


def test_the_formula_knows_who_replied_to_a_strategy_that_is_no_subclass_of_the_method(runs: LlamaRuns) -> None:
    whole = runs.run(**SECTIONS, strategy=strategy(runs, SameRounds))
    assert payload(whole, "down") == payload(runs.run(**SECTIONS), "down")
    resumed = runs.run(**SECTIONS, strategy=strategy(runs, SameRounds), stop=2)
    assert table(whole, "communication.csv") == table(resumed, "communication.csv")
    assert all(torch.equal(array, adapter(resumed)[name]) for name, array in adapter(whole).items())


@pytest.mark.parametrize(("stop", "kept"), [(1, True), (2, False)])
def test_tensors_that_a_strategy_dropped_do_not_come_back(runs: LlamaRuns, stop: int, kept: bool) -> None:
    runs.run(**SECTIONS, strategy=strategy(runs, Forgetful), stop=stop)
    assert Forgetful.restored is kept
