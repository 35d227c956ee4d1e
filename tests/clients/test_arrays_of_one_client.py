"""Arrays that are one client's alone: those that stay with it, and frozen ones that the server sends to it alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.drawn_methods import POINTS
from tests.llama_runs import LlamaRuns, adapter, payload, runs_of_methods

NAMES = ("home-b", "own-a")
SECTIONS = {"run": {"rounds": 3, "seed": 3}, "client": {"local_steps": 2, "batch_size": 4}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaRuns]:
    with runs_of_methods(tmp_path_factory.mktemp("one-client"), POINTS) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_clients_trained_together_are_clients_trained_alone(runs: LlamaRuns, name: str) -> None:
    method = {"name": name, "rank": 2}
    alone = runs.run(**SECTIONS, method=method, simulation={"workers": 0, "cohort_size": 1})
    together = runs.run(**SECTIONS, method=method, simulation={"workers": 0, "cohort_size": 4})
    assert payload(alone, "down") == payload(together, "down") > 0
    found = adapter(together)
    for key, array in adapter(alone).items():
        torch.testing.assert_close(found[key], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_same_bits(runs: LlamaRuns, name: str) -> None:
    method = {"name": name, "rank": 2}
    whole, resumed = adapter(runs.run(**SECTIONS, method=method)), adapter(runs.run(**SECTIONS, method=method, stop=1))
    assert all(torch.equal(array, resumed[key]) for key, array in whole.items())
