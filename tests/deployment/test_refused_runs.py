"""What the user of ``fedlora run --on`` sees when owners refuse: one line and its exit code, at once."""

from __future__ import annotations

import csv
import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.command import Done, fedlora
from tests.deployment.federation import NAME, Federation
from tests.deployment.test_federation import config_of

TIMEOUT = 400.0
"""Of a round; a run that is refused ends long before."""


@pytest.fixture(autouse=True)
def owners(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Owners whose ledgers are empty, and who accept the run."""
    monkeypatch.setenv("FLWR_HOME", str(federation.home))
    federation.set_policy(max_epsilon=9.0, delta=1e-3)
    federation.empty_ledgers()
    yield
    federation.set_policy(max_epsilon=9.0, delta=1e-3)


def change(federation: Federation, name: str, section: str, **values: Any) -> None:
    """Let an owner change their node.toml; it holds from the next message on."""
    path = federation.folder / f"{name}.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    content[section] |= values
    path.write_text(tomli_w.dumps(content), encoding="utf-8")


def submit(federation: Federation, examples: Path, name: str, min_replies: int) -> tuple[Done, Path]:
    """Run one step on every node that takes part; return what the command did, and the run folder here."""
    content = config_of(
        examples, name, run={"rounds": 1}, client={"local_steps": 1},
        model={"num_hidden_layers": 1}, server={"timeout": TIMEOUT, "min_replies": min_replies},
    )  # fmt: skip
    path = federation.folder / f"{name}.run.toml"
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    folder = federation.folder / "runs" / name
    began = time.monotonic()
    done = fedlora("run", path, "--on", NAME, "--output", folder)
    assert time.monotonic() - began < TIMEOUT
    return done, folder


def refused(federation: Federation, done: Done, folder: Path) -> str:
    """Check that a run left nothing behind, so that the command may be given again; return its one line."""
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) == 1
    assert not folder.exists()
    assert not (federation.folder / "server" / "runs" / folder.name).exists()
    return done.err.strip()


def test_a_config_beyond_every_owners_policy(federation: Federation, examples: Path) -> None:
    federation.set_policy(max_epsilon=9.0, delta=1e-3, min_noise_multiplier=50.0)
    done, folder = submit(federation, examples, "weak", 1)
    assert done.code == 2
    assert refused(federation, done, folder) == (
        "fedlora: privacy.target_epsilon = 8.0: east refuses (PolicyError, code 107): its owner's policy is "
        "min_noise_multiplier = 50.0; keep to it; north, west refused as well"
    )


def test_other_labels_than_the_runs(federation: Federation, examples: Path) -> None:
    other = federation.folder / "other-labels.csv"
    other.write_text("text,label\n" + "".join(f"a tale {n},{'ab'[n % 2]}\n" for n in range(40)), encoding="utf-8")
    change(federation, "west", "data", path=str(other), format="csv")
    done, folder = submit(federation, examples, "labels", 3)
    assert done.code == 2
    assert refused(federation, done, folder) == (
        "fedlora: data.label_names = None: west refuses (LabelError, code 109): its labels are others; "
        "name the classes of all nodes, in one spelling"
    )


def test_enough_are_left_until_a_budget_is_spent(federation: Federation, examples: Path) -> None:
    change(federation, "east", "policy", max_grad_norm=0.001)
    change(federation, "north", "data", text="no-such-column")
    done, folder = submit(federation, examples, "enough", 1)
    assert (done.code, done.err) == (0, "")
    assert "east refuses (PolicyError, code 107): its owner's policy is max_grad_norm = 0.001; keep to it" in done.out
    assert "north refuses (InputError, code 104)" in done.out
    assert "the run continues with 1 of 3 nodes" in done.out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["clients"] == 1
    with (folder / "privacy.csv").open(encoding="utf-8") as stream:
        assert [row["steps"] for row in csv.DictReader(stream)] == ["1"]
    # East and north accept it now; west has spent nearly all, and two are too few.
    federation.set_policy(max_epsilon=9.0, delta=1e-3)
    done, folder = submit(federation, examples, "spent", 3)
    left = 9.0 - summary["epsilon"]["max"]
    assert done.code == 1
    assert refused(federation, done, folder) == (
        f"fedlora: west refuses (BudgetError, code 103): epsilon left = {left:.4g} does not cover a round of this run; "
        "lower privacy.target_epsilon or client.local_steps, or ask its owner for a higher policy.max_epsilon"
    )
