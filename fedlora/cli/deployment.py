"""The commands of real nodes: ``fedlora trial | server | node | node status | node backup | keys``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fedlora.cli.tables import print_table


class _Node(TyperGroup):
    """``fedlora node NODE.toml`` is the command ``run``: a file's name stands where those of others do."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name before what is none, and no request for help."""
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


node = typer.Typer(
    cls=_Node,
    help="Run a data owner's node (fedlora node NODE.toml), or show what it has spent.",
    no_args_is_help=True,
    add_completion=False,
)
keys = typer.Typer(help="Make keys for a trial, and let nodes in.", no_args_is_help=True, add_completion=False)

_TRIAL = Path(__file__).parents[1] / "experiments" / "trial.toml"

NoTls = Annotated[
    bool,
    typer.Option("--insecure-no-tls", help="Plain HTTP: anybody on the network path can read and change what is sent."),
]
NoNodeAuth = Annotated[
    bool, typer.Option("--insecure-no-node-auth", help="Accept anybody who reaches the server's port as a node.")
]
NodeFile = Annotated[Path, typer.Argument(metavar="NODE.toml", help="The node's TOML file.")]
Folder = Annotated[Path, typer.Option("--folder", help="The folder of the key files.")]


def server(
    file: Annotated[Path, typer.Argument(metavar="SERVER.toml", help="The server's TOML file.")],
    no_tls: NoTls = False,
    no_node_auth: NoNodeAuth = False,
) -> None:
    """Run a server (Flower's SuperLink) until SIGTERM or Ctrl-C."""
    from fedlora.deployment.config import load_server

    config = load_server(file)
    from fedlora.deployment.server import serve

    with _talk():
        serve(config, tls=not no_tls, node_auth=not no_node_auth)


def trial(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="A config of a simulation; experiments/trial.toml by default."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; an empty value removes it."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes, among which the examples are divided.")] = 3,
    folder: Annotated[Path, typer.Option(help="For all files of the trial; must not exist.")] = Path("trial"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server and the nodes running.")] = False,
) -> None:
    """Try real nodes on this machine: start a server and nodes, run a config on them, and stop them.

    Each step is printed as the command that it is. The server and the nodes use TLS and keys, each a folder of its own.
    """
    from fedlora.cli import parse_overrides
    from fedlora.config import load_config

    overrides = {"data.partition.clients": nodes, **parse_overrides(set_ or [])}
    loaded = load_config(_TRIAL if config is None else config, overrides)
    from fedlora.deployment.trial import run_trial

    run_trial(loaded, folder, typer.echo, keep=keep)


@node.command("run")
def run_node(
    file: NodeFile,
    no_tls: NoTls = False,
    no_node_auth: NoNodeAuth = False,
) -> None:
    """Run a data owner's node (Flower's SuperNode) until SIGTERM or Ctrl-C."""
    from fedlora.node.config import load_node

    config = load_node(file)
    from fedlora.deployment.node import join

    with _talk():
        join(file, config, tls=not no_tls, node_auth=not no_node_auth)


@node.command("status")
def status(
    file: NodeFile = Path("node.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the runs that a node served, and the epsilon that is spent and left; the node may be running."""
    from fedlora.node.config import load_node
    from fedlora.node.status import node_status
    from fedlora.results.folder import to_json

    found = node_status(load_node(file))
    if as_json:
        typer.echo(to_json(found.to_dict(), indent=2))
        return
    left = "no ceiling: runs without privacy are accepted"
    if found.left is not None:
        left = f"{found.left:.6g} of {found.max_epsilon:g}"
    for name, text in (
        ("node", found.name),
        ("data", found.data),
        ("ledger", found.ledger),
        ("protects", found.unit),
        ("spent", f"epsilon {found.epsilon:.6g} at delta {found.delta:g}, by {found.accountant}; {found.steps} steps"),
        ("left", left),
    ):
        typer.echo(f"{name:<10}{text}")
    numbers = ("round", "steps", "epsilon", "of all so far", "left")
    rows = []
    for one in found.runs:
        spent = (f"{one.epsilon:.4g}", f"{one.total:.4g}", "-" if one.left is None else f"{one.left:.4g}")
        dates = one.described_at, one.begun_at or "-"
        rows.append((one.name or one.federation, *dates, str(one.rounds), str(one.steps), *spent))
    if rows:
        headings = ("run", "first asked (UTC)", "last trained (UTC)", *numbers)
        print_table(Console(), headings, rows, right=numbers, whole=True)


@node.command("backup")
def backup(
    file: NodeFile,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The copy; must not exist.")],
) -> None:
    """Copy a node's ledger, whole, also while the node is running."""
    from fedlora.node.config import load_node
    from fedlora.node.status import open_ledger

    ledger = open_ledger(load_node(file))
    ledger.back_up(target)
    typer.echo(f"{target}: {ledger.path}, with epsilon {ledger.epsilon():.6g} spent")


def digest(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model's folder, with its tokenizer.")],
) -> None:
    """Print a folder's entry for the models of a node.toml's policy: its name, and the SHA-256 of its files."""
    from fedlora.config.inline_toml import inline_toml
    from fedlora.node.policy import folder_digest

    typer.echo(inline_toml({"name": str(folder), "sha256": folder_digest(folder)}))


@keys.command("ca")
def ca(folder: Folder = Path("keys")) -> None:
    """Make an authority: ca.crt goes to every node, ca.key signs server certificates."""
    from fedlora.deployment.keys import make_ca

    _show(make_ca(folder))


@keys.command("server")
def server_keys(
    host: Annotated[list[str], typer.Option("--host", help="Name or address by which nodes reach the server.")],
    folder: Folder = Path("keys"),
) -> None:
    """Make a server's certificate and key, signed by the authority in the folder."""
    from fedlora.deployment.keys import make_server_certificate

    _show(make_server_certificate(folder, host))


@keys.command("node")
def node_key(
    name: Annotated[str, typer.Argument(help="The node's name.")],
    folder: Folder = Path("keys"),
) -> None:
    """Make a node's keys: NAME.key stays on the node, NAME.pub goes to the server's owner."""
    from fedlora.deployment.keys import make_node_key

    _show(make_node_key(folder, name))


@keys.command("register")
def register(
    public_key: Annotated[Path, typer.Argument(metavar="PUBLIC_KEY", help="The node's .pub file.")],
    on: Annotated[
        str, typer.Option("--on", metavar="NAME", help="A server that Flower's config.toml names as superlink.NAME.")
    ],
    name: Annotated[str | None, typer.Option(help="The node's name; the file's name by default.")] = None,
) -> None:
    """Let a node in, on a running server."""
    from fedlora.deployment.control import Server
    from fedlora.deployment.keys import read_public_key

    key = read_public_key(public_key, "PUBLIC_KEY")
    with Server.named(on) as superlink:
        superlink.register(key, name or public_key.stem)
    typer.echo(f"{name or public_key.stem} is registered on {on}")


@keys.command("unregister")
def unregister(
    name: Annotated[str, typer.Argument(metavar="NODE", help="The node's name.")],
    on: Annotated[
        str, typer.Option("--on", metavar="NAME", help="A server that Flower's config.toml names as superlink.NAME.")
    ],
) -> None:
    """Let a node in no more, on a running server."""
    from fedlora.deployment.control import Server

    with Server.named(on) as superlink:
        superlink.unregister(name)
    typer.echo(f"{name} is no longer registered on {on}")


@keys.command("list")
def list_nodes(
    on: Annotated[
        str, typer.Option("--on", metavar="NAME", help="A server that Flower's config.toml names as superlink.NAME.")
    ],
) -> None:
    """List the nodes that are registered on a running server, and whether they are online."""
    from fedlora.deployment.control import Server

    with Server.named(on) as superlink:
        for one in superlink.nodes():
            typer.echo(f"{one.name:<32}{one.status}")


def _show(paths: list[Path]) -> None:
    for path in paths:
        typer.echo(path)


@contextmanager
def _talk() -> Iterator[None]:
    """Log what the supervisor does to the terminal, where systemd and docker collect it, and show what goes on."""
    from fedlora.cli.phases import PhaseDisplay

    logger, handler = logging.getLogger("fedlora.deployment"), logging.Handler()
    display = PhaseDisplay(Console(stderr=True), log=logger.info)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.emit = lambda record: display.say(handler.format(record))  # type: ignore[method-assign]
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        with display:
            yield
    finally:
        logger.handlers, logger.level, logger.propagate = before
