"""Compare the results of short runs, bit for bit, between this checkout and another commit of it.

    python -m tests.golden --against REVISION           # both on this machine, then the differences
    python -m tests.golden --against REVISION --only ffa-lora fed-sb

Each case is one run on the CPU, trained in the run's own process. What is compared: every array of the result, the rows
of privacy.csv, and the payload and formula columns of communication.csv. Bits hold within one machine only, so both
sides are run here. It exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_SHORT = {
    "run.rounds": 2,
    "client.local_steps": 2,
    "client.batch_size": 8,
    "data.partition.clients": 3,
    "data.max_test_examples": 32,
    "simulation.workers": 0,
}
_EXPERTS = {
    "run.rounds": 1,
    "client.local_steps": 2,
    "data.max_test_examples": 8,
    "data.max_examples": 200,
    "model.num_hidden_layers": 2,
    "simulation.workers": 0,
}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    # name: config, overrides, whether the run is stopped after its first round and resumed
    "fed-sb": ("quickstart", _SHORT, False),
    "fed-sb-open": ("quickstart", _SHORT | {"privacy.mode": "none"}, False),
    "fed-sb-resumed": ("quickstart", _SHORT, True),
    "ffa-lora": ("quickstart", _SHORT | {"method.name": "ffa-lora"}, False),
    "ffa-lora-resumed": ("quickstart", _SHORT | {"method.name": "ffa-lora", "privacy.mode": "none"}, True),
    "fedit": ("quickstart", _SHORT | {"method.name": "fedit"}, False),
    "fedit-workers": ("quickstart", _SHORT | {"method.name": "fedit", "simulation.workers": 2}, False),
    "flexmore": ("flexmore", _EXPERTS, False),
    "flexmore-private": (
        "flexmore",
        _EXPERTS | {"privacy.mode": "example", "privacy.target_epsilon": 8.0, "run.rounds": 2},
        True,
    ),
    "smollm2": ("smollm2", _EXPERTS | {"run.rounds": 2}, False),
}


def digests(case: str, folder: Path) -> dict[str, str]:
    """Run a case in this checkout, into ``folder``, and return a digest of each of its results."""
    from fedlora.simulator import Progress, simulate  # where every commit has them

    name, overrides, resumed = CASES[case]
    config = ROOT / "experiments" / f"{name}.toml"

    def stop(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    if resumed:
        try:
            simulate(config, overrides, output=folder, progress=Progress(on_round=stop))
        except KeyboardInterrupt:
            simulate(config, overrides, output=folder, resume=True)
    else:
        simulate(config, overrides, output=folder)
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{array}": digest for array, digest in _arrays(path)}
    for path, columns in (("privacy.csv", None), ("communication.csv", ("payload_bytes", "formula_bytes"))):
        if not (folder / path).exists():
            continue
        with (folder / path).open(newline="") as file:
            rows = [[v for k, v in row.items() if columns is None or k in columns] for row in csv.DictReader(file)]
        found[path] = _digest(json.dumps(rows).encode())
    return found


def _arrays(path: Path) -> list[tuple[str, str]]:
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (TypeError, KeyError):  # bfloat16, which numpy lacks
        return [("", _digest(path.read_bytes()))]
    return [(n, _digest(f"{a.dtype}{a.shape}".encode() + a.tobytes())) for n, a in sorted(arrays.items())]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _run(tree: Path, case: str) -> dict[str, str]:
    """Run a case with the code of a tree, in a process of its own; this file is the same for both."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(Path(__file__)),
            "--tree",
            str(tree),
            "--case",
            case,
            "--folder",
            f"{folder}/run",
        ]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def compare(revision: str, cases: list[str]) -> bool:
    """Print for each case whether both commits give the same; return whether all do."""
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(other), revision], check=True)
        try:
            for case in cases:
                before, after = _run(other, case), _run(ROOT, case)
                different = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
                failed = "error" in before or "error" in after
                same = not different and not failed
                equal &= same
                print(f"{case}: {'equal' if same else 'DIFFERENT'} ({len(after)} digests)", flush=True)
                for name in different[:5]:
                    print(f"    {name}: {before.get(name)} -> {after.get(name)}", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a commit, branch or tag")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    for internal in ("--tree", "--case", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        global ROOT
        ROOT = Path(arguments.tree)
        print(json.dumps(digests(arguments.case, Path(arguments.folder))))
        return
    if not arguments.against:
        parser.error("--against is needed")
    sys.exit(0 if compare(arguments.against, arguments.only) else 1)


if __name__ == "__main__":
    main()
