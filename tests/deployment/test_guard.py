"""Who may call which of the SuperLink's interfaces, and read which files."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fedlora.deployment.superlink_process import Guard, add_routes, own_networks

HERE, ADMIN, STRANGER = "127.0.0.1", "10.1.2.3", "203.0.113.9"
PATHS = {
    "/v1/fleet/pull-messages": {HERE, ADMIN, STRANGER},
    "/fedlora/node": {HERE, ADMIN, STRANGER},
    "/health": {HERE, ADMIN, STRANGER},
    "/v1/control/start-run": {HERE, ADMIN},
    "/v1/control/register-node": {HERE, ADMIN},
    "/fedlora/runs/some": {HERE, ADMIN},
    "/v1/runtime/acquire-task": {HERE},
    "/docs": {HERE, ADMIN},
    "/v1/fleet/../control/start-run": {HERE, ADMIN},
    "//v1/runtime/acquire-task": {HERE, ADMIN},
}


@pytest.mark.parametrize("caller", [HERE, ADMIN, STRANGER, "::1", "::ffff:203.0.113.9"])
@pytest.mark.parametrize("path", PATHS)
def test_who_may_call_what(path: str, caller: str) -> None:
    guard = Guard(FastAPI(), own_networks("0.0.0.0"), [ipaddress.ip_network("10.0.0.0/8")])
    meant = {"::1": HERE, "::ffff:203.0.113.9": STRANGER}.get(caller, caller)
    assert guard._allowed({"path": path, "client": (caller, 1234)}) == (meant in PATHS[path])


def test_a_stranger_gets_403_and_nothing_else() -> None:
    app = FastAPI()
    app.add_middleware(Guard, own=own_networks("0.0.0.0"), control=[])
    assert TestClient(app, client=(STRANGER, 1)).post("/v1/control/start-run").status_code == 403
    assert TestClient(app, client=(HERE, 1)).post("/v1/control/start-run").status_code == 404


def test_a_named_host_is_this_machine_too() -> None:
    assert ipaddress.ip_network("192.0.2.7") in own_networks("192.0.2.7")


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    run = tmp_path / "runs" / "first"
    (run / "adapter").mkdir(parents=True)
    (run / "rounds.jsonl").write_text("{}\n")
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / ".summary.json.17").write_text("half")
    (tmp_path / "state.db").write_text("secret")
    (run / "link").symlink_to(tmp_path / "state.db")
    app = FastAPI()
    add_routes(app, tmp_path / "runs")
    return TestClient(app)


def test_a_run_folder_is_listed_without_files_on_their_way(client: TestClient) -> None:
    files = client.get("/fedlora/runs/first").json()
    assert files == {"rounds.jsonl": 3, "adapter/adapter_config.json": 2, "link": 6}
    assert client.get("/fedlora/runs/first/rounds.jsonl").text == "{}\n"


@pytest.mark.parametrize(
    "path",
    [
        "other", "first/missing", "first/../../state.db", "first/%2e%2e/%2e%2e/state.db", "..%2f..", "%2e%2e",
        "first//etc/hostname", "first/link", "first/adapter",
    ],
)  # fmt: skip
def test_nothing_outside_a_run_folder_is_served(client: TestClient, path: str) -> None:
    reply = client.get(f"/fedlora/runs/{path}")
    assert reply.status_code == 404
    assert "secret" not in reply.text
