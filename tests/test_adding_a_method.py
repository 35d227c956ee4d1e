"""The code and the commands of docs/adding-a-method.md, from the empty file to the report."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from fedlora.methods import forget_methods, get_method, methods
from tests.command import fedlora
from tests.packages import lay_package
from tests.small_runs import Watched, World, world

TEXT = (Path(__file__).parents[1] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
MODULE = "written_by_the_guide"


def blocks(text: str) -> str:
    """Return the Python of a text, as one file."""
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("guide")) as made:
        yield made


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The guide's file in a package of its own."""
    points = {"my-fedsvd": f"{MODULE}:MyFedSVD", "slow-fedsvd": f"{MODULE}:SlowFedSVD"}
    lay_package(tmp_path, MODULE, {"fedlora.methods": points}, blocks(TEXT))
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_methods()
    yield tmp_path
    sys.modules.pop(MODULE, None)
    forget_methods()


def test_the_commands_run_it_and_report(here: World, written: Path) -> None:
    (written / "run.toml").write_text(tomli_w.dumps(here.content("fedit", "bert")))
    commands = re.findall(r"^    fedlora (.+)$", TEXT, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["methods", "run", "run", "report"]
    for command in commands:
        words = command.replace("experiments/quickstart.toml", str(written / "run.toml"))
        done = fedlora(*re.sub(r"(?<= )runs/", f"{written}/runs/", words).split())
        assert done.code == 0, done.err
        if command == "methods":
            assert {"my-fedsvd", "slow-fedsvd"} <= {line.split(" ")[0] for line in done.out.splitlines()}
    assert (written / "runs" / "my-fedsvd" / "report.html").exists()
    summary = json.loads((written / "runs" / "my-fedsvd" / "summary.json").read_text())
    assert summary["method"] == "my-fedsvd"
    communication = summary["communication"]
    assert communication["payload_bytes"] == communication["formula_bytes"] > 0


def test_it_is_the_method_of_the_repository(here: World, written: Path) -> None:
    mine, ours = (here.run(here.content(name, "llama")) for name in ("my-fedsvd", "fedsvd"))
    assert seen(mine) == seen(ours)
    assert max(mine.errors) < 1e-6
    for fact in ("exact", "persistent", "paper", "learning_rates", "dp"):  # the guide's takes one rank for all
        assert getattr(get_method("my-fedsvd"), fact) == getattr(get_method("fedsvd"), fact)


def test_its_option_counts(here: World, written: Path) -> None:
    assert "method.refactor_every" in fedlora("config", "method.refactor_every").out
    often, seldom, never = (
        here.run(here.content("slow-fedsvd", "llama", method={"refactor_every": every})) for every in (1, 2, 9)
    )
    assert seen(often) == seen(here.run(here.content("fedsvd", "llama")))
    assert len({str(seen(run)) for run in (often, seldom, never)}) == 3
    # Between two refactorings A stands still, and the mean stays exact.
    assert max(often.errors + seldom.errors + never.errors) < 1e-6


def seen(run: Watched) -> object:
    """Return a run's arrays."""
    return {name: array.numpy().tobytes() for name, array in run.arrays().items()}


def test_the_file_is_as_ours_are(written: Path) -> None:
    """Names of the guide's are taken by nobody, and its table of roles names what there is."""
    assert {"my-fedsvd", "slow-fedsvd", "fedsvd"} <= methods().keys()
    from fedlora import roles

    for word in re.findall(r"^\| `([A-Z]+)`", TEXT, re.MULTILINE):
        assert isinstance(getattr(roles, word), roles.Role)
    for call in re.findall(r"^\| `(Role\(.*?\))`", TEXT, re.MULTILINE):
        eval(call, {"Role": roles.Role})
