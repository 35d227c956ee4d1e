"""The process of one message on a node: of the app that a server sends, nothing is unpacked."""

from __future__ import annotations

import hashlib
import io
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from flwr.supernode.runtime import run_clientapp

from fedlora.deployment import clientapp_process

PYPROJECT = """
[project]
name = "fedlora"
version = "../../../../outside/x"
license = {text = "none"}
[tool.flwr.app]
publisher = "fedlora"
[tool.flwr.app.components]
serverapp = "a:b"
clientapp = "a:b"
"""


def sent_app() -> bytes:
    """Make an app whose version is a path."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as app:
        app.writestr("pyproject.toml", PYPROJECT)
        digest = hashlib.sha256(PYPROJECT.encode()).hexdigest()
        app.writestr(".info/CONTENT", f"pyproject.toml,{digest},{8 * len(PYPROJECT)}\n")
    return content.getvalue()


def test_an_app_that_a_server_sends_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get_load_client_app_fn", "install_from_fab"):
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))  # taken back after the test
    # Flower's own goes where the version says.
    flower, node = tmp_path / "flower", tmp_path / "node"
    monkeypatch.setenv("FLWR_HOME", str(flower / "home"))
    run_clientapp.install_from_fab(sent_app(), skip_prompt=True)
    assert (flower / "outside").is_dir()

    def process() -> None:
        run_clientapp.install_from_fab(sent_app(), skip_prompt=True)

    node.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(node / "home"))
    monkeypatch.setattr("sys.argv", ["flwr-clientapp"])
    program = import_module("flwr.supernode.cli.flwr_clientapp")
    monkeypatch.setattr(program, "flwr_clientapp", process)
    clientapp_process.main()
    assert not list(node.iterdir())
