"""A user's own strategy or client is told apart from the method's, and from another of theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedlora import InputError, simulate
from fedlora.clients.client_app import app as ours
from fedlora.config import Config, load_config
from fedlora.reporting.comparison import compare
from fedlora.reporting.runs import read_runs
from fedlora.results.user_code import describe, describe_app, with_user_code
from tests.tiny import save_llama


class Kept(FedAvg):
    """Keeps its arguments under their names."""

    def __init__(self, beta: Any = 0.5, config: Config | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.beta, self._config = beta, config


class Renamed(FedAvg):
    """Keeps its argument under another name."""

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        self.momentum = beta


def code(method: str) -> str:
    """Describe a class of this source, in a process of its own."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from flwr.serverapp.strategy import FedAvg
from fedlora.results.user_code import describe
class Mine(FedAvg):
    {method}
print(describe(Mine(fraction_train=0.5)))
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_class_and_arguments_can_be_read() -> None:
    assert str(describe(FedAvg())).startswith("flwr.serverapp.strategy.fedavg.FedAvg() ")
    found = describe(Kept(0.25, fraction_train=0.5))
    assert found.name == f"{__name__}.Kept"
    assert found.arguments == {"beta": "0.25", "fraction_train": "0.5"}
    assert str(found) == f"{found.name}(beta=0.25, fraction_train=0.5) {found.source[:12]}"
    assert len(found.source) == 64


@pytest.mark.parametrize(
    "value",
    [
        lambda: 0.25,
        lambda: {"a": [1, 2], "b": {3, "x", (4, 5)}},
        lambda: np.arange(3.0),
        lambda: torch.arange(3.0, dtype=torch.bfloat16),
        lambda: ArrayRecord({"w": Array(np.ones(3, np.float32))}),
        lambda: code,
        lambda: lambda x: x + 1,
        lambda: Kept,
        lambda: Path("a"),
        lambda: "x" * 1000,
        lambda: object(),
    ],
)
def test_the_same_again_is_the_same(value: Callable[[], Any]) -> None:
    assert describe(Kept(value())) == describe(Kept(value()))
    assert describe(Kept(value())) != describe(Kept(0.125))
    assert "0x" not in str(describe(Kept(value())))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FedAvg(), FedAdam()),
        (FedAvg(), Kept()),
        (Kept(0.1), Kept(0.2)),
        (Kept([1, 2]), Kept([2, 1])),
        (Kept(fraction_train=0.5), Kept(fraction_train=0.6)),
        (Kept(np.zeros(3)), Kept(np.zeros(3, np.float32))),
        (Kept(torch.zeros(3)), Kept(torch.ones(3))),
        (Kept(lambda x: x + 1), Kept(lambda x: x + 2)),
        (Renamed(0.1), Renamed(0.2)),
        (FedAdam(eta=0.1), FedAdam(eta=0.2)),
    ],
)
def test_another_is_another(one: object, other: object) -> None:
    assert str(describe(one)) != str(describe(other))


def test_a_changed_line_is_another_class() -> None:
    first, again, other = (code(f"def summary(self): return {number}") for number in (1, 1, 2))
    assert first == again != other


def test_the_config_is_no_argument() -> None:
    """It is recorded as it is; seeds of one strategy are one group."""
    base = {"model": {"name": "x"}, "data": {"name": "x", "partition": {"clients": 2}}, "method": {"name": "fedit"}}
    first, second = (describe(Kept(config=load_config(base, {"run.seed": seed}))) for seed in (1, 2))
    assert first == second == describe(Kept())


def test_clients_are_told_apart_by_their_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def app(factor: int) -> ClientApp:
        made = ClientApp()

        @made.train()
        def train(message: Message, context: Context) -> Message:
            assert factor
            return Message(message.content, reply_to=message)

        return made

    assert describe_app(app(1)) == describe_app(app(1))
    assert describe_app(app(1)) != describe_app(app(2))
    assert describe_app(ours) == describe_app(ours)
    monkeypatch.syspath_prepend(tmp_path)
    digests = set()
    for text in ("app = 1", "app = 2"):
        (tmp_path / "of_mine.py").write_text(text)
        digests.add(str(describe_app("of_mine:app")))
    assert len(digests) == 2
    with pytest.raises(InputError, match=r"client_app = 'no_such_module:app': there is no such module"):
        describe_app("no_such_module:app")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_llama(folder / "model")
    lines = "".join(json.dumps({"text": f"w4 w5 w{word}"}) + "\n" for word in range(6, 26))
    (folder / "texts.jsonl").write_text(lines)
    return folder


def config(place: Path) -> dict[str, Any]:
    texts = str(place / "texts.jsonl")
    return {
        "run": {"name": "own", "rounds": 1},
        "model": {"name": str(place / "model"), "task": "causal-lm", "max_length": 8},
        "data": {"name": texts, "test": texts, "partition": {"clients": 2}},
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 4, "local_steps": 1},
        "simulation": {"workers": 0},
    }


@pytest.mark.usefixtures("bare")
def test_reports_tell_runs_with_different_strategies_apart(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two was left out as the same run again."""
    monkeypatch.setenv("FEDLORA_CACHE", str(place / "cache"))
    runs = place / "runs"
    of = {"method": None, "half": Kept(0.5), "quarter": Kept(0.25), "again": Kept(0.25)}
    for name, strategy in of.items():
        summary = simulate(config(place), output=runs / name, strategy=strategy).summary
        assert summary.get("strategy", {}).get("arguments") == (
            None if strategy is None else {"beta": "0.25"} if strategy.beta == 0.25 else {}
        )
    comparison = compare(read_runs([runs]))
    assert [run.name for run in comparison.duplicates] == ["quarter"]
    assert comparison.axes == ["run.strategy"]
    assert len(comparison.groups) == 3
    # A run's own config says what it was: with nothing, or another, in its place it does not run.
    with pytest.raises(InputError, match=r"run\.strategy = .*Kept\(beta=0\.25\) .*only simulate\(\.\.\., strategy="):
        simulate(runs / "quarter" / "config.toml", output=place / "other")
    with pytest.raises(InputError, match=r"run\.strategy = .*: is not what simulate\(\) was given, .*Kept\(\)"):
        simulate(runs / "quarter" / "config.toml", output=place / "other", strategy=Kept())
    with pytest.raises(InputError, match=r"run\.strategy = .*differs from the run's"):
        simulate(config(place), output=runs / "quarter", strategy=Kept(0.125), resume=True)
    again = simulate(config(place), output=runs / "quarter", strategy=Kept(0.25), resume=True)
    assert again.folder == runs / "quarter"
    assert not (place / "other").exists()


def test_what_is_said_twice_must_agree() -> None:
    base = load_config(
        {"model": {"name": "x"}, "data": {"name": "x", "partition": {"clients": 2}}, "method": {"name": "fedit"}}
    )
    own = {"strategy": describe(Kept(0.1))}
    said = with_user_code(base, own)
    assert said.run.strategy == str(own["strategy"])
    assert with_user_code(said, own) == said
    assert with_user_code(base, {}) == base
