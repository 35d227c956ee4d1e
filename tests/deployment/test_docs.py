"""What docs/deployment.md tells people to write is what the commands read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from fedlora.cli import app
from fedlora.config import load_config
from fedlora.deployment.config import load_server
from fedlora.node.config import load_node

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "deployment.md").read_text(encoding="utf-8")


def block(name: str, folder: Path) -> Path:
    """Write the block that begins with ``# NAME``."""
    found = [text for text in re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL) if text.startswith(f"# {name}")]
    assert len(found) == 1
    (folder / name).write_text(found[0], encoding="utf-8")
    return folder / name


def test_server_toml(tmp_path: Path) -> None:
    config = load_server(block("server.toml", tmp_path))
    assert (config.host, config.port, config.folder) == ("0.0.0.0", 8000, tmp_path / "server")
    assert config.tls is not None


def test_node_toml(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("review,verdict\n")
    node = load_node(block("node.toml", tmp_path))
    assert (node.name, node.policy.max_epsilon) == ("north", 8.0)
    assert node.superlink.private_key == str(tmp_path / "keys" / "north.key")


def test_config_toml_is_a_runs(tmp_path: Path) -> None:
    config = load_config(block("config.toml", tmp_path))
    assert (config.data.name, config.privacy.target_epsilon) == ("nodes", 4.0)


def test_flowers_entry_is_toml() -> None:
    entry = next(text for text in re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL) if text.startswith("[superlink."))
    assert set(tomllib.loads(entry)["superlink"]["trial"]) == {"address", "root-certificates"}


@pytest.mark.parametrize("line", re.findall(r"^    (fedlora [^#\n]+)", TEXT, re.MULTILINE))
def test_commands_exist(line: str) -> None:
    command = get_command(app)
    words = line.split()[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    # What follows may be no command of the group, but an argument of the one that it gives by default.
    command = getattr(command, "commands", {}).get(getattr(command, "default", ""), command)
    assert not hasattr(command, "commands"), f"no such command: {line}"
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_compose_runs_the_two_commands() -> None:
    services = yaml.safe_load((DOCS / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert [services[name]["command"][:2] for name in ("server", "node")] == [
        ["fedlora", "server"],
        ["fedlora", "node"],
    ]
    assert all(service["stop_grace_period"] == "2m" for service in services.values())
