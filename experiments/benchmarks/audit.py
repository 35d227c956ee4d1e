"""Audits on MiniLM: what attacks prove beside what is claimed, by example and by client, at three epsilons and none.

Two audits a case: the white-box attack with many canaries, and a whole run with mislabelled ones, of whose final model
losses and memberships are guessed. Without privacy there is the second alone. Whole runs are for a GPU; ``--no-inputs``
leaves them out, and takes minutes on two cores::

    python -m fedlora.experiments.benchmarks.audit --output audit.json
    python -m fedlora.experiments.benchmarks.audit --no-inputs --canaries 2000 --output audit_white_box.json
    python -m fedlora.experiments.benchmarks.audit --show audit.json
    python -m fedlora.experiments.benchmarks.audit --tiny
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedlora.experiments.benchmarks.machine import machine


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with those of ``second`` in the place of equal ones, or beside them."""
    found = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found


def cases(settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the config of each case."""
    for level, sections in settings["levels"].items():
        content = merged(settings["base"], sections)
        content["run"]["name"] = f"audit-{level}"
        if level == "none":
            yield level, content
            continue
        for epsilon in settings["epsilons"]:
            yield f"{level} {epsilon:g}", merged(content, {"privacy": {"target_epsilon": epsilon}})


def measure(content: dict[str, Any], settings: Mapping[str, Any], inputs: bool = True) -> dict[str, Any]:
    """Audit one config both ways, or by the white-box attack alone; return the audits and their seconds."""
    from fedlora.audit import audit

    found: dict[str, Any] = {}
    private = "privacy" in content
    if private:
        began = time.perf_counter()
        white = audit(content, canaries=settings["canaries"], inputs=False)
        found["white box"] = white.to_dict() | {"seconds": time.perf_counter() - began}
    if not inputs:
        return found
    began = time.perf_counter()
    count, shadows = settings["input_canaries"], settings["shadows"]
    whole = audit(content, canaries=count, shadows=shadows, releases=False)
    found["final model"] = whole.to_dict() | {"seconds": time.perf_counter() - began}
    return found


def table(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = ["| case | attack | claimed | proved at least | by | canaries | checks | seconds |", "|---" * 8 + "|"]
    for case, audits in results["cases"].items():
        for name, found in audits.items():
            claimed, bound = found["claimed"]["epsilon"], found["lower_bound"]
            failed = [check["name"] for check in found["checks"] if not check["passed"]]
            cells = (
                case,
                name,
                "none" if claimed is None else f"{claimed:.2f}",
                f"{bound['epsilon']:.2f}",
                bound["attack"],
                found["canaries"],
                ", ".join(failed) or ("passed" if found["checks"] else "none"),
                f"{found['seconds']:.0f}",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the chosen cases, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--cases", nargs="+", help='such as "example 8"; all by default')
    parser.add_argument("--canaries", type=int, help="of the white-box attack; the config's by default")
    parser.add_argument("--no-inputs", action="store_true", help="leave out whole runs")
    parser.add_argument("--tiny", action="store_true", help="check the script on two cores")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, metavar="RAW", help="print the table of raw figures, and measure nothing")
    arguments = parser.parse_args()
    if arguments.show:
        print(table(json.loads(arguments.show.read_text(encoding="utf-8"))))
        return
    settings = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    tiny = settings.pop("tiny")
    settings = merged(settings, tiny) if arguments.tiny else settings
    settings["canaries"] = arguments.canaries or settings["canaries"]
    if not torch.cuda.is_available():
        settings["base"]["simulation"]["gpus_per_worker"] = 0.0
    results: dict[str, Any] = {"machine": machine(), "settings": settings, "cases": {}}
    for name, content in cases(settings):
        if not arguments.cases or name in arguments.cases:
            found = measure(content, settings, inputs=not arguments.no_inputs)
            if not found:  # without privacy there is no white-box attack
                continue
            results["cases"][name] = found
            print(table({"cases": {name: found}}), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
