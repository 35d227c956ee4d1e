"""Faults in the middle of a run, from end to end: what the run does, says, and keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import Message

from fedlora import simulator
from fedlora.errors import ClientErrorCode
from fedlora.simulation import LocalGrid
from fedlora.strategies.base import NO_REPLY
from tests.command import Done, fedlora
from tests.faulty_clients import CULPRIT, MENDED, ROUND

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cached", "bare")]

CONFIG: dict[str, Any] = {
    "run": {"rounds": 3, "seed": 3},
    "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 16, "num_hidden_layers": 1},
    "data": {"name": "asset:rotten-tomatoes", "max_examples": 60, "max_test_examples": 20, "partition": {"clients": 3}},
    "method": {"name": "fed-sb", "rank": 2},
    "client": {"batch_size": 8, "local_steps": 1},
    "simulation": {"workers": 0},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "config.toml"
    path.write_text(tomli_w.dumps(CONFIG))
    return path


def run(config: Path, folder: Path, app: str | None, *more: str, resume: bool = False) -> Done:
    """Give the command, with other clients."""
    with pytest.MonkeyPatch.context() as patched:
        if app is not None:
            defaults: Any = simulator.simulate.__kwdefaults__
            patched.setitem(defaults, "client_app", f"tests.faulty_clients:{app}")
        sets = [part for pair in more for part in ("--set", pair)]
        return fedlora("run", config, "--output", folder, *sets, *(["--resume"] if resume else []))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def bits(folder: Path) -> str:
    """Hash what was trained."""
    files = sorted((folder / "adapter").glob("*.safetensors"))
    assert len(files) == 2
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def without_the_culprit(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the other clients make, where the culprit's process says that it failed."""
    folder = tmp_path_factory.mktemp("runs") / "raising"
    assert run(config, folder, "raising").code == 0
    return bits(folder)


@pytest.fixture(scope="module")
def healthy(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What all make."""
    folder = tmp_path_factory.mktemp("runs") / "healthy"
    assert run(config, folder, None).code == 0
    return bits(folder)


@pytest.mark.parametrize(
    ("app", "code", "said"),
    [
        ("raising", ClientErrorCode.FAILED, "MemoryError: client 1 has no room"),
        ("nan", ClientErrorCode.REPLY, "is not finite"),
        ("headless", ClientErrorCode.REPLY, "are not those of float32 numbers"),
        ("heavy", ClientErrorCode.REPLY, "num-examples is 1.7e+308"),
    ],
)
def test_a_client_that_fails_costs_the_round_itself_alone(
    app: str, code: int, said: str, config: Path, tmp_path: Path, without_the_culprit: str, healthy: str
) -> None:
    done = run(config, tmp_path / app, app)
    assert (done.code, done.err) == (0, "")
    assert "Traceback" not in done.out
    assert said in done.out
    of_rounds = lines(tmp_path / app)
    assert [line["counted"] for line in of_rounds] == [True] * 3
    assert [[f["client"] for f in line["failed"]] for line in of_rounds] == [[], [CULPRIT], []]
    assert of_rounds[ROUND - 1]["failed"][0]["code"] == code
    assert bits(tmp_path / app) == without_the_culprit != healthy


@pytest.mark.usefixtures("ray_here")
def test_a_worker_that_is_killed_costs_the_round_its_client_alone(config: Path, tmp_path: Path) -> None:
    done = run(config, tmp_path / "killed", "killed", "simulation.workers=1")
    assert (done.code, done.err) == (0, "")
    failed = [(f["client"], f["code"]) for line in lines(tmp_path / "killed") for f in line["failed"]]
    assert failed == [(CULPRIT, ClientErrorCode.WORKER_DIED)]
    assert [line["counted"] for line in lines(tmp_path / "killed")] == [True] * 3


class Answers(LocalGrid):
    """Clients whose replies the network repeats or loses."""

    repeated, lost = False, False

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Pass replies on, some of them twice or never."""
        outgoing = list(messages)
        for place, reply in enumerate(super().send_and_receive(outgoing, timeout=timeout)):
            if self.lost and (place, outgoing[0].metadata.group_id) == (CULPRIT, str(ROUND)):
                continue
            yield reply
            if self.repeated and outgoing[0].metadata.message_type == "train":
                yield reply


def test_a_client_that_answers_twice_counts_once(
    config: Path, tmp_path: Path, healthy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "repeated", True)
    monkeypatch.setattr(simulator, "LocalGrid", Answers)
    done = run(config, tmp_path / "twice", None)
    assert (done.code, done.err) == (0, "")
    assert bits(tmp_path / "twice") == healthy
    assert (tmp_path / "twice" / "run.log").read_text().count("answered twice: its first reply counts") == 9


@pytest.mark.parametrize("least", [2, 3])
def test_a_client_that_never_answers_and_min_replies_kept_and_missed(
    least: int, config: Path, tmp_path: Path, without_the_culprit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "lost", True)
    monkeypatch.setattr(simulator, "LocalGrid", Answers)
    done = run(config, tmp_path / "lost", None, f"server.min_replies={least}")
    assert (done.code, done.err) == (0, "")
    line = lines(tmp_path / "lost")[ROUND - 1]
    assert [(f["client"], f["code"]) for f in line["failed"]] == [(CULPRIT, NO_REPLY)]
    assert "client 1 failed: no reply within the timeout" in done.out
    if least == 2:
        assert (line["counted"], line["uncounted"]) == (True, None)
        assert bits(tmp_path / "lost") == without_the_culprit
    else:
        why = "2 replies are fewer than server.min_replies = 3"
        assert (line["counted"], line["uncounted"]) == (False, why)
        assert f"round 2 does not count: {why}" in done.out
        # The model stays what it was, and the run goes on.
        first, second, third = (line["metrics"]["loss"] for line in lines(tmp_path / "lost"))
        assert first == second != third


def test_a_round_in_which_all_fail_ends_the_run_in_one_line_and_it_goes_on_from_there(
    config: Path, tmp_path: Path, healthy: str
) -> None:
    folder = tmp_path / "broken"
    done = run(config, folder, "broken")
    assert done.code == 1
    (told,) = done.err.splitlines()
    assert told.startswith("fedlora: every client of the round failed; the first said: MemoryError: no room at all")
    assert [line["round"] for line in lines(folder)] == [1]
    assert not (folder / "summary.json").exists()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(MENDED, "1")
        again = run(config, folder, "broken", resume=True)
    assert (again.code, again.err) == (0, "")
    assert bits(folder) == healthy


@pytest.mark.parametrize("output", ["/proc/none/run", "/dev/null/run", "file/run"])
def test_an_output_that_cannot_be_written_is_one_line_before_anything_is_loaded(
    output: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simulator, "prepare_data", lambda config: pytest.fail("loaded"))
    done = run(config, Path(output), None)
    assert done.code == 2
    (told,) = done.err.splitlines()
    assert told.startswith("fedlora: --output = ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
