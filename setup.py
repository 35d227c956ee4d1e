"""What goes into a distribution that is built in a checkout: files that git tracks, and no others.

Without this, setuptools would also pack a user's own methods in strategies/ and configs in experiments/. All else is in
pyproject.toml. A source distribution has no .git: all that it holds is packed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent


@cache
def tracked() -> frozenset[Path] | None:
    """Return the files that git tracks; None where nothing says which these are."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"warning: git cannot list its files ({error}); untracked files are packed too", file=sys.stderr)
        return None
    return frozenset((ROOT / name).resolve() for name in done.stdout.decode().split("\0") if name)


def kept(files: Iterable[str]) -> list[str]:
    """Return the files that belong into a distribution; what setuptools makes itself does."""
    known = tracked()
    return [
        file
        for file in files
        if known is None or (ROOT / file).resolve() in known or Path(file).parts[0].endswith(".egg-info")
    ]


class BuildTracked(build_py):
    """Packs modules and data files that are tracked."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Leave out modules that are not tracked."""
        found = super().find_package_modules(package, package_dir)
        files = set(kept(file for _, _, file in found))
        return [module for module in found if module[2] in files]

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        """Leave out data files that are not tracked."""
        return kept(super().find_data_files(package, src_dir))


class SdistTracked(sdist):
    """Packs files that are tracked, whatever an earlier build's list of sources says."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Leave out files that are not tracked."""
        super().make_release_tree(base_dir, kept(files))


setup(cmdclass={"build_py": BuildTracked, "sdist": SdistTracked})
