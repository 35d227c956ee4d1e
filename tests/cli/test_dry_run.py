"""``fedlora run --dry-run``: what a run will take, before it starts."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora import simulate
from tests.command import Done, fedlora
from tests.study.studies import TINY


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dry") / "run.toml"
    path.write_text(tomli_w.dumps({**TINY["base"], "simulation": {"workers": 0}}))
    return path


@pytest.fixture
def elsewhere(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def estimated(config: Path, *more: str) -> dict[str, Any]:
    done = fedlora("run", config, "--dry-run", "--json", *more)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_the_run_takes_what_was_estimated(config: Path, elsewhere: Path) -> None:
    expected = estimated(config)
    assert os.listdir(elsewhere) == []
    done = simulate(config, output=elsewhere / "run")
    sent = done.summary["communication"]
    for key in ("initial_bytes", "downlink_bytes", "uplink_bytes"):
        way = {"initial": "initial", "downlink": "down", "uplink": "up"}[key.removesuffix("_bytes")]
        with (elsewhere / "run" / "communication.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["direction"] == way]
        assert expected[key] == sum(int(row["payload_bytes"]) for row in rows)
    assert expected["payload_bytes"] == sent["payload_bytes"]
    assert expected["trainable_parameters"] == done.summary["trainable_parameters"]
    with (elsewhere / "run" / "privacy.csv").open() as file:
        charged = list(csv.DictReader(file))
    noise = {int(row["client"]): float(row["noise_multiplier"]) for row in charged}
    assert all(expected["noise_multipliers"][client] == pytest.approx(sigma) for client, sigma in noise.items())
    assert expected["workers"] == 1
    # A process with torch and a model, in bytes; and a run has its overhead.
    assert 1e8 < expected["memory_bytes"] < 1e11
    assert 5 < expected["seconds"] < 600


def test_people_read_the_same(config: Path, elsewhere: Path) -> None:
    done = fedlora("run", config, "--dry-run")
    assert done.code == 0, done.err
    told = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    expected = estimated(config)
    base = TINY["base"]
    assert list(told)[:4] == ["task", "model", "data", "method"]
    assert told["task"] == expected["task"] == "sequence-classification"
    assert told["model"] == expected["model"] == base["model"]["name"]
    assert told["data"] == f"{expected['data']}, 3 clients, {base['data']['partition']['kind']}"
    assert told["method"].startswith(f"{expected['method']}, rank ")
    assert expected["method"] == base["method"]["name"]
    assert told["clients"] == "3"
    assert told["payload"].split(", ")[-1] == f"{expected['uplink_bytes']:,} bytes up"
    assert told["steps"] == f"{expected['steps']} of all clients"
    low, high = min(expected["noise_multipliers"]), max(expected["noise_multipliers"])
    assert told["noise"] == f"multiplier {low:.4g} - {high:.4g}"
    assert told["epsilon"] == "8"
    assert told["memory"].endswith("of memory a worker")
    assert told["time"].endswith("with 1 worker here, from one measured step")


def test_a_machine_without_the_gpu_forecasts_all_but_memory_and_time(config: Path, elsewhere: Path) -> None:
    found = estimated(config, "--set", "simulation.workers=1", "--set", "simulation.gpus_per_worker=1")
    assert (found["memory_bytes"], found["seconds"]) == (None, None)
    assert found["payload_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--json"], "--json = True: prints what --dry-run estimates"),
        (["--dry-run", "--on", "trial"], "--dry-run = 'trial': estimates simulations"),
        (["--dry-run", "--set", "method.rank=400"], "method.rank = 400: "),
        (["--dry-run", "--set", "data.test=server"], "data.test = 'server': is reserved for nodes"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(arguments: list[str], told: str, config: Path, elsewhere: Path) -> None:
    done: Done = fedlora("run", config, *arguments)
    assert done.code == 2
    assert done.err.startswith(f"fedlora: {told}"), done.err
    assert len(done.err.splitlines()) == 1
    assert os.listdir(elsewhere) == []
