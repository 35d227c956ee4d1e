"""Whole runs of a second: a tiny Llama, four clients in this process, and texts of a few words.

Each call runs anew, also a user's own strategy, so that a test may patch what a run uses. :mod:`tests.small_runs`
watches the runs of a method, and runs equal ones once.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load_file

from fedlora import simulate
from fedlora.arrays import Arrays
from fedlora.config import Config, load_config
from fedlora.methods import forget_methods
from fedlora.results.folder import RunResult
from fedlora.strategies.callbacks import Progress
from fedlora.strategies.server_app import resolve
from fedlora.study.forecast import Forecast, forecast
from tests.bare_runs import bare_runs
from tests.packages import lay_package
from tests.tiny import save_llama

OWNERS = 4
"""Clients, each with other examples than the next, and more of them."""


class LlamaRuns:
    """A model and examples in a folder, and runs on them.

    Parameters
    ----------
    folder : Path
        Empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_llama(folder / "model")
        for split, count in (("train", 30), ("test", 4)):
            rows = [{"text": f"w4 w{5 + n} w6 w7", "owner": f"o{min(n % 7, OWNERS - 1)}"} for n in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._count = 0

    def config(self, **sections: dict[str, Any]) -> Config:
        """Make a config; ``method={...}`` and the like add to the sections."""
        content: dict[str, dict[str, Any]] = {
            "run": {"rounds": 3, "seed": 3},
            "model": {"name": str(self.folder / "model"), "task": "causal-lm", "max_length": 8},
            "data": {
                "name": str(self.folder / "train.jsonl"),
                "test": str(self.folder / "test.jsonl"),
                "partition": {"kind": "natural", "column": "owner"},
            },
            "method": {"name": "ffa-lora", "rank": 2},
            "client": {"local_steps": 1, "batch_size": 4},
            "simulation": {"workers": 0},
        }
        for section, values in sections.items():
            content[section] = {**content.get(section, {}), **values}
        return load_config(content)

    def run(
        self, *, stop: int = 0, strategy: Callable[[], Strategy] | None = None, **sections: dict[str, Any]
    ) -> RunResult:
        """Run to the end, with the method's strategy by default; with ``stop``, stop after that round and resume."""
        self._count += 1
        content = self.config(**sections).model_dump(exclude_none=True)
        output, made = self.folder / f"run-{self._count}", strategy or type(None)

        def on_round(line: dict[str, Any]) -> None:
            if line["round"] == stop:
                raise KeyboardInterrupt

        with self._cache():
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    simulate(content, output=output, strategy=made(), progress=Progress(on_round=on_round))
            return simulate(content, output=output, strategy=made(), resume=bool(stop))

    def forecast(self, **sections: dict[str, Any]) -> Forecast:
        """Forecast the run."""
        with self._cache():
            return forecast(resolve(self.config(**sections)))

    @contextmanager
    def _cache(self) -> Iterator[None]:
        with bare_runs() as patch:
            patch.setenv("FEDLORA_CACHE", str(self.folder / "cache"))
            yield


@contextmanager
def runs_of_methods(
    folder: Path, points: Mapping[str, Mapping[str, str]], module: str = "methods_of_a_test", code: str | None = None
) -> Iterator[LlamaRuns]:
    """Make runs that find methods by entry points, as :func:`tests.packages.lay_package` takes them.

    Parameters
    ----------
    folder : Path
        Empty.
    points : mapping of str to mapping of str to str
    module : str
    code : str, optional
        Of the module.
    """
    lay_package(folder / "site", module, points, code)
    (folder / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "site"))
        forget_methods()
        yield LlamaRuns(folder / "runs")
    forget_methods()


def lines(result: RunResult) -> list[dict[str, Any]]:
    """Return the lines of rounds.jsonl."""
    return [json.loads(line) for line in (result.folder / "rounds.jsonl").read_text().splitlines()]


def table(result: RunResult, name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file of the run."""
    with (result.folder / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def adapter(result: RunResult) -> Arrays:
    """Return what was trained."""
    found: Arrays = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    return found


def payload(result: RunResult, direction: str) -> int:
    """Add up what communication.csv measured in a direction; the formula must say the same of every row."""
    rows = [row for row in table(result, "communication.csv") if row["direction"] == direction]
    assert all(row["payload_bytes"] == row["formula_bytes"] for row in rows)
    return sum(int(row["payload_bytes"]) for row in rows)
