"""An ordinary user's first minutes with a wheel: an empty environment, a folder of their own, the quickstart.

The folder has subfolders ``strategies/`` and ``clients/`` whose modules are not for fedlora: importing one ends the
check. The wheel's dependencies come from the package index, as constraints.txt pins them, so that this takes minutes::

    make check-wheel
    python tests/check_wheel.py dist/fedlora-*.whl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
THEIRS = ("strategies", "clients")
FIND = "import fedlora, fedlora.strategies, fedlora.clients; print(fedlora.__file__)"
QUICKSTART = "from importlib.resources import files; print(files('fedlora.experiments') / 'quickstart.toml')"


def lay_folder(place: Path) -> Path:
    """Make a working directory with folders that are called as fedlora's are."""
    for name in THEIRS:
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text(
            "raise ImportError('the user\\'s own, which fedlora took for its own')\n"
        )
    return place


def check(wheel: Path, place: Path, rounds: int | None) -> None:
    """Install a wheel below a folder, and use it there."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    here = lay_folder(place / "user")
    bin_folder = place / "environment" / "bin"
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"

    def do(*command: object) -> str:
        print("$", *command, flush=True)
        began = time.monotonic()
        done = subprocess.run(
            [*map(str, command)], cwd=here, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        print(done.stdout, f"# {time.monotonic() - began:.0f} s", sep="", flush=True)
        if done.returncode:
            raise SystemExit(f"that ended with exit code {done.returncode}")
        return done.stdout.strip()

    venv.create(place / "environment", with_pip=True)
    do(bin_folder / "python", "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, wheel.resolve())
    do(bin_folder / "python", "-m", "pip", "check")
    found = Path(do("python", "-c", FIND))
    if place / "environment" not in found.parents:
        raise SystemExit(f"fedlora is {found}, not what was installed")
    config = do("python", "-c", QUICKSTART)
    shorter = ["--set", f"run.rounds={rounds}"] if rounds else []
    do("fedlora", "--version")
    do("fedlora", "run", config, *shorter)
    do("fedlora", "show", "runs/quickstart")
    do("fedlora", "report", "runs/quickstart")
    summary = json.loads((here / "runs" / "quickstart" / "summary.json").read_text(encoding="utf-8"))
    if rounds not in (None, summary["rounds"]) or not (here / "runs" / "quickstart" / "report.html").is_file():
        raise SystemExit("the run or its report is not whole")


def main() -> None:
    """Check the wheel that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--rounds", type=int, help="of the quickstart; all by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedlora-wheel-") as place:
        check(given.wheel, Path(place), given.rounds)
    print(f"{given.wheel.name} installs and runs on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
