"""Arrays that are one client's alone: those that stay with it, and frozen ones that the server sends to it alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedlora.methods import forget_methods
from tests.llama_runs import LlamaRuns, adapter, payload

METHODS = """
from fedlora.roles import TRAINED, Role
from fedlora.strategies.base import FederatedStrategy, Payload, drawn_factors


class _Drawn(FederatedStrategy):
    title, paper = "Arrays of one client", "none"
    learning_rates = {"adamw": 1e-2, "sgd": 0.1}

    def start_arrays(self, adapted, data):
        return drawn_factors(adapted, self.config.run.seed)

    def payload(self, sizes, contact):
        a = sum(sizes.rank * n for m, n in sizes.layers)
        b = sum(sizes.rank * m for m, n in sizes.layers)
        return Payload(initial=b, down=a, up=a) if self.name == "home-b" else Payload(initial=0, down=a + b, up=b)


class HomeB(_Drawn):
    name = "home-b"

    @classmethod
    def roles(cls, config, server_round):
        return {"lora_A": TRAINED, "lora_B": Role(trained=True, home=True)}


class OwnA(_Drawn):
    name = "own-a"

    @classmethod
    def roles(cls, config, server_round):
        return {"lora_A": Role(down="round"), "lora_B": TRAINED}

    def client_arrays(self, client):
        return client, {n: a * (client + 1) if n.endswith("lora_A") else a for n, a in self.arrays.items()}
"""
NAMES = ("home-b", "own-a")
SECTIONS = {"run": {"rounds": 3, "seed": 3}, "client": {"local_steps": 2, "batch_size": 4}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaRuns]:
    folder = tmp_path_factory.mktemp("one-client")
    about: Path = folder / "site" / "one_client-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: one_client\nVersion: 1.0\n")
    points = "".join(f"{name} = one_client:{name.title().replace('-', '')}\n" for name in NAMES)
    (about / "entry_points.txt").write_text(f"[fedlora.methods]\n{points}")
    (folder / "site" / "one_client.py").write_text(METHODS)
    (folder / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "site"))
        forget_methods()
        yield LlamaRuns(folder / "runs")
    forget_methods()


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
