"""A report replaces an earlier one and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.reporting.report_files import MANIFEST, write_files
from tests.command import fedlora
from tests.reporting.folders import make_run

FILES = {"report.html": b"page", "report/runs.csv": b"runs", "report/figures/a.png": b"a"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_report_is_replaced_and_its_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_files(tmp_path, FILES)
    new = {"report.html": b"new page", "report/runs.csv": b"runs"}
    write_files(tmp_path, new)
    assert not (tmp_path / "report" / "figures").exists()
    found = content(tmp_path)
    assert found.pop(MANIFEST)
    assert found == {**new, "notes.txt": b"mine"}


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("earlier", [False, True])
def test_a_file_of_the_users_is_never_overwritten(tmp_path: Path, name: str, earlier: bool) -> None:
    if earlier:
        write_files(tmp_path, FILES)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    before = content(tmp_path)
    with pytest.raises(InputError, match=name):
        write_files(tmp_path, {**FILES, "report/new.csv": b"new"})
    assert content(tmp_path) == before


def test_a_changed_file_that_is_no_longer_written_stays(tmp_path: Path) -> None:
    write_files(tmp_path, FILES)
    (tmp_path / "report/runs.csv").write_bytes(b"mine")
    write_files(tmp_path, {"report.html": b"page"})
    assert (tmp_path / "report/runs.csv").read_bytes() == b"mine"
    assert not (tmp_path / "report/figures/a.png").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"page")
    (tmp_path / "report.html").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"report\.html"):
        write_files(tmp_path, FILES)


def test_an_interrupted_report_can_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, FILES)
    new = {name: b"new " + old for name, old in FILES.items()}
    written = Path.write_bytes
    count = 0

    def die(path: Path, data: bytes) -> int:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return written(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", die)
        with pytest.raises(KeyboardInterrupt):
            write_files(tmp_path, new)
    write_files(tmp_path, new)
    assert {name: data for name, data in content(tmp_path).items() if name in new} == new


@given(text=st.binary(max_size=30) | st.just(b'{"../x": ["y"]}') | st.just(b'{"report.html": "x"}'))
def test_a_manifest_of_somebody_else_gives_nothing_away(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    folder = tmp_path_factory.mktemp("manifest") / "inner"
    (folder / "report").mkdir(parents=True)
    (folder / MANIFEST).write_bytes(text)
    (folder / "report.html").write_bytes(b"mine")
    (folder.parent / "x").write_bytes(b"y")
    with pytest.raises(InputError):
        write_files(folder, FILES)
    assert (folder / "report.html").read_bytes() == b"mine"
    assert (folder.parent / "x").exists()


@pytest.mark.usefixtures("quick")
def test_runs_are_untouched_and_a_run_named_report_is_no_place_for_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a", 0, {})
    before = content(tmp_path)
    assert fedlora("report", tmp_path / "runs").code == 0
    assert fedlora("report", tmp_path / "runs").code == 0
    after = content(tmp_path)
    assert {name: data for name, data in after.items() if name in before} == before
    make_run(tmp_path / "runs" / "report2", 1, {"run.seed": 1}).rename(tmp_path / "other")
    (tmp_path / "clash").mkdir()
    (tmp_path / "other").rename(tmp_path / "clash" / "report")
    done = fedlora("report", tmp_path / "clash")
    assert done.code == 2
    assert "choose another --output" in done.err
    assert fedlora("report", tmp_path / "clash", "--output", tmp_path / "elsewhere").code == 0


@pytest.mark.usefixtures("quick")
def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0, {})
    (tmp_path / "file").write_text("mine")
    done = fedlora("report", tmp_path / "a", "--output", tmp_path / "file")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert (tmp_path / "file").read_text() == "mine"
