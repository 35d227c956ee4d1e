"""A run on a grid whose clients keep nothing: what was spent before is counted, or the run is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.clients.client_app import app
from fedlora.config import load_config
from fedlora.data.tokens import prepare_data
from fedlora.errors import InputError
from fedlora.results.folder import RunResult, run_folder
from fedlora.simulation.local_grid import LocalGrid
from fedlora.strategies.base import get_strategy
from fedlora.strategies.callbacks import Progress
from fedlora.strategies.federation import Federation
from fedlora.strategies.server_app import resolve

CONFIG = {
    "run": {"rounds": 2},
    "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 16, "num_hidden_layers": 1},
    "data": {"name": "asset:rotten-tomatoes", "max_examples": 60, "max_test_examples": 20, "partition": {"clients": 1}},
    "method": {"name": "fed-sb", "rank": 2},
    "client": {"batch_size": 8, "local_steps": 2},
    "simulation": {"workers": 0},
}

pytestmark = pytest.mark.usefixtures("bare")


def run(folder: Path, privacy: dict[str, Any], *, resume: bool, stop: bool = False) -> RunResult:
    """Run on a grid whose clients forget their state with the run, as those of Flower's own runtimes do."""
    config = resolve(load_config({**CONFIG, "privacy": privacy}))

    def on_round(line: dict[str, Any]) -> None:
        if stop:
            raise KeyboardInterrupt

    grid = LocalGrid(app, 1, run_config={"config": config.to_toml()})
    with run_folder(folder, config, resume=resume) as opened, grid:
        method = get_strategy("fed-sb")(config)
        progress = Progress(on_round=on_round)
        return Federation(config, grid, opened, prepare_data(config), method, progress=progress).run()


@pytest.mark.parametrize("private", [True, False])
def test_a_private_run_whose_clients_forgot_what_they_spent_is_not_resumed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    privacy = {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3} if private else {"mode": "none"}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", privacy, resume=False, stop=True)
    if private:
        with pytest.raises(InputError, match="ledgers"):
            run(tmp_path / "run", privacy, resume=True)
    else:
        assert run(tmp_path / "run", privacy, resume=True).summary["rounds"] == 2


def test_an_accountant_that_may_count_too_little_is_told(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    for accountant in ("gdp", "prv"):
        caplog.clear()
        privacy = {"mode": "example", "noise_multiplier": 2.0, "target_delta": 1e-3, "accountant": accountant}
        run(tmp_path / accountant, privacy, resume=False)
        told = [record for record in caplog.records if "too small an epsilon" in record.getMessage()]
        assert len(told) == (accountant == "gdp")
