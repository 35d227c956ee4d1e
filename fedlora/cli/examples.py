"""Examples at the end of each command's help, and in the reference of the documentation."""

from __future__ import annotations

import typer

EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        "fedlora run experiments/quickstart.toml",
        "fedlora run experiments/quickstart.toml --set method.rank=4 --output runs/rank-4",
        "fedlora run experiments/quickstart.toml --dry-run",
        "fedlora run experiments/quickstart.toml --resume",
        "fedlora run config.toml --on trial",
    ),
    "init": (
        "fedlora init",
        "fedlora init reviews.toml --data reviews.csv --text review --label stars --clients 5 --epsilon 8",
        "fedlora init clinics.toml --data notes.csv --owner clinic --yes",
    ),
    "show": ("fedlora show runs/quickstart", "fedlora show runs/quickstart --every 1"),
    "runs": ("fedlora runs", "fedlora runs runs/smoke"),
    "config": (
        "fedlora config",
        "fedlora config privacy",
        "fedlora config client.local_steps",
        "fedlora config --all",
    ),
    "methods": ("fedlora methods", "fedlora methods --json"),
    "assets": ("fedlora assets", "fedlora assets minilm-l6 rotten-tomatoes"),
    "study": (
        "fedlora study experiments/studies/smoke.toml --dry-run",
        "fedlora study experiments/studies/smoke.toml",
    ),
    "report": (
        "fedlora report runs/quickstart runs/rank-4",
        "fedlora report runs --output reports/first",
        "fedlora report runs --budget bytes=1e6 --budget epsilon=3 --target 0.7",
    ),
    "export": (
        "fedlora export runs/quickstart",
        "fedlora export runs/quickstart --merged --output models/reviews",
        "fedlora export runs/validated --best",
    ),
    "privacy": ("fedlora privacy runs/quickstart", "fedlora privacy runs/quickstart --client 3 --json"),
    "audit": (
        "fedlora audit experiments/quickstart.toml",
        "fedlora audit experiments/quickstart.toml --canaries 1000 --json",
    ),
    "trial": (
        "fedlora trial",
        "fedlora trial experiments/quickstart.toml --set run.rounds=2 --nodes 4 --folder trial-4",
        "fedlora trial --keep",
    ),
    "server": ("fedlora server server.toml",),
    "node run": ("fedlora node run node.toml",),
    "node status": ("fedlora node status node.toml",),
    "node backup": ("fedlora node backup node.toml north-ledger.sqlite",),
    "digest": ("fedlora digest models/own-bert",),
    "keys ca": ("fedlora keys ca",),
    "keys server": ("fedlora keys server --host 192.168.1.10 --host fl.example.org",),
    "keys node": ("fedlora keys node north",),
    "keys register": ("fedlora keys register keys/north.pub --on trial",),
    "keys unregister": ("fedlora keys unregister north --on trial",),
    "keys list": ("fedlora keys list --on trial",),
}
"""Command lines by command."""


def add_examples(app: typer.Typer, prefix: str = "") -> None:
    """Put the examples at the end of the help of an app's commands, and of those of its groups."""
    for command in app.registered_commands:
        name = f"{prefix}{command.name or getattr(command.callback, '__name__', '')}"
        # A blank line keeps each on a line of its own.
        command.epilog = "\n\n".join(["Examples:", *EXAMPLES.get(name, ())]) if name in EXAMPLES else None
    for group in app.registered_groups:
        assert group.typer_instance is not None
        add_examples(group.typer_instance, f"{prefix}{group.name} ")
