"""What is released: one version everywhere, and a source distribution from which the same wheel can be made."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.check_wheel import THEIRS, lay_folder
from tests.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    versions = re.findall(
        r"^## (\d+\.\d+\.\d+)", (ROOT / "docs" / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert versions[0] == PROJECT["version"]
    assert versions == sorted(versions, key=lambda text: [*map(int, text.split("."))], reverse=True)


def test_pythons_that_are_named_are_those_that_are_allowed() -> None:
    named = [
        text.rpartition(" ")[2]
        for text in PROJECT["classifiers"]
        if text.startswith("Programming Language :: Python :: ")
    ]
    first, last = named[0], named[-1]
    assert PROJECT["requires-python"] == f">={first},<3.{int(last.partition('.')[2]) + 1}"
    assert f"Python {first} to {last}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[0]
    for page in ("README.md", "docs/index.md", "docs/tutorials/first-run.md", "docs/reference/source.md"):
        assert f"Python {first} to {last}" in (ROOT / page).read_text(encoding="utf-8")


def test_every_requirement_has_a_pin() -> None:
    pins = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]}  # type: ignore[index]
    assert not wanted - pins


def test_the_source_distribution_has_all_that_the_wheel_has(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=ignored)
    build = "import setuptools.build_meta as build, sys; build.build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path / "tree", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"fedlora-{PROJECT['version']}.tar.gz"
    with tarfile.open(archive) as content:
        files = {member.name.partition("/")[2] for member in content if member.isfile()}
    wanted = {f"fedlora/{path.relative_to(ROOT / 'fedlora')}" for path in (ROOT / "fedlora").rglob("*.py")}
    for name in ("strategies", "clients", "experiments"):
        wanted |= {f"fedlora/{path.relative_to(ROOT)}" for path in (ROOT / name).rglob("*.py")}
    assert not wanted - files
    assert {"pyproject.toml", "README.md", "LICENSE", "fedlora/experiments/quickstart.toml"} <= files


BUILD = """
import sys
import setuptools.build_meta as build
target = sys.argv[1]  # building changes it
build.build_sdist(target)
build.build_wheel(target)
"""
OWN = (
    "strategies/mine.py",
    "strategies/own/__init__.py",
    "clients/mine.py",
    "experiments/mine.toml",
    "fedlora/mine.py",
)
"""Files that a user may put into a checkout."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a module in each of the folders that a wheel takes, a config, and files of the user's."""
    tree = tmp_path / "tree"
    for name in ("fedlora", "strategies", "clients", "experiments"):
        (tree / name).mkdir(parents=True)
        (tree / name / "__init__.py").touch()
        if name != "fedlora":
            (tree / "fedlora" / name).symlink_to(f"../{name}")
    (tree / "experiments" / "quickstart.toml").touch()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for command in (("init", "--quiet"), ("add", "--all")):
        subprocess.run(["git", *command], cwd=tree, check=True)
    for name in OWN:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    return tree


def packed(tree: Path, target: Path) -> tuple[set[str], set[str]]:
    """Build both distributions, and return the files of fedlora in each."""
    target.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", BUILD, str(target)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (source,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    with tarfile.open(source) as content:
        files = {member.name.partition("/")[2] for member in content if member.isfile()}
    return {name for name in files if name.startswith("fedlora/")}, {
        name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fedlora/")
    }


def test_what_git_does_not_track_is_in_no_distribution(checkout: Path, tmp_path: Path) -> None:
    # An earlier build, without setup.py, left its list of sources.
    listed = checkout / "fedlora.egg-info" / "SOURCES.txt"
    listed.parent.mkdir()
    listed.write_text("fedlora/strategies/mine.py\n")
    belongs = {f"fedlora/{name}/__init__.py" for name in ("strategies", "clients", "experiments")}
    belongs |= {"fedlora/__init__.py", "fedlora/experiments/quickstart.toml"}
    assert packed(checkout, tmp_path / "dist") == (belongs, belongs)
    # In an unpacked source distribution, and without git, nothing says what belongs: all does.
    shutil.rmtree(checkout / ".git")
    owned = {name if name.startswith("fedlora/") else f"fedlora/{name}" for name in OWN}
    assert packed(checkout, tmp_path / "again") == (belongs | owned, belongs | owned)


def test_a_users_folders_of_our_names_are_not_ours(tmp_path: Path) -> None:
    place = lay_folder(tmp_path)
    for name in THEIRS:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=place, capture_output=True, text=True, check=False
        )
        assert "the user's own" in done.stderr
    found = "import fedlora.strategies, fedlora.clients"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", found], cwd=place, env=environment, check=True)


def test_issue_forms_are_forms() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(form)
            assert all("label" in part["attributes"] for part in form["body"])


def test_the_pages_of_the_project_are_in_the_documentation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "papers.md"):
        assert (ROOT / "docs" / name).is_file()
        assert f": {name}\n" in navigation
