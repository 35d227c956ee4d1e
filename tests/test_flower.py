"""What fedlora needs of Flower below its public interface: each test says what breaks when Flower changes it."""

from __future__ import annotations

import ast
import importlib
import io
import pickle
import subprocess
import sys
import tomllib
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto

from fedlora import flower

ROOT = Path(__file__).parents[1]
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.common.constant", "flwr.simulation")


def message() -> Message:
    flower.act_as(7, 1)
    arrays = ArrayRecord({"a.weight": Array(np.arange(6, dtype=np.float32).reshape(2, 3))})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"x": 1}), "metrics": MetricRecord({"loss": 0.5})})
    return Message(content, 12, "train.part", ttl=30.0, group_id="3")


def test_a_message_can_be_made_in_this_process() -> None:
    """Else no simulation begins: ``Message(...)`` asks a Flower runtime who it is."""
    metadata = message().metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.dst_node_id) == (7, 1, 12)


def test_a_run_without_a_server_can_be_told() -> None:
    """Else ``Grid.run`` of a simulation has nothing to return."""
    assert flower.empty_run(5).run_id == 5


def test_a_reply_names_the_message_that_it_answers() -> None:
    """Else pushed messages and pulled replies cannot be matched, nor the SuperLink's errors be given to their node."""
    asked = message()
    flower.set_message_id(asked, "f" * 64)
    reply = Message(RecordDict(), reply_to=asked)
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == ("f" * 64, 12)


def test_metadata_and_errors_can_be_corrected() -> None:
    """Else an error that the SuperLink sends in a node's place is counted for nobody, and its text is the server's."""
    asked = message()
    flower.set_run_id(asked, 8)
    flower.set_source(asked, 3)
    assert (asked.metadata.run_id, asked.metadata.src_node_id) == (8, 3)
    error = Error(1, "as sent")
    flower.set_reason(error, "as told")
    assert error.reason == "as told"


def test_a_record_can_be_made_of_arrays_that_were_checked() -> None:
    """Else a simulated client's reply takes the driver a millisecond more: Flower checks each array again."""
    made = message().content.array_records["arrays"]
    again = flower.unchecked_record((n, a.dtype, a.shape, a.stype, a.data) for n, a in made.items())
    assert again == made
    assert again["a.weight"].is_dirty
    again["b"] = again["a.weight"]
    assert pickle.loads(pickle.dumps(again)) == again
    del again["b"]
    assert again.object_id == made.object_id


@pytest.mark.parametrize("failed", [False, True])
def test_a_message_taken_apart_is_the_same_again(failed: bool) -> None:
    """Else messages cannot travel to Ray's workers with their arrays in shared memory."""
    asked = Message(Error(2, "no"), reply_to=message()) if failed else message()
    again = flower.with_metadata(asked.error if failed else asked.content, asked.metadata)
    assert message_to_proto(again) == message_to_proto(asked)


def test_all_metadata_is_known() -> None:
    """Else a message's size is remembered under too few of the things that it depends on."""
    asked = message()
    values = flower.metadata_values(asked)
    assert {name.lstrip("_") for name in values} >= {"message_id", "group_id", "ttl", "message_type", "created_at"}
    for name in values:
        assert hasattr(asked.metadata, name.lstrip("_"))


def test_secrets_can_be_shared_and_sealed() -> None:
    """Else there are no secure sums: their keys agree, and their shares are combined and encrypted, as Flower does."""
    from cryptography.hazmat.primitives.asymmetric import ec

    first, second = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    key = flower.agreed_key(first, second.public_key())
    assert key == flower.agreed_key(second, first.public_key())
    assert flower.decrypt(key, flower.encrypt(key, b"shares")) == b"shares"
    shares = flower.create_shares(b"s" * 32, 2, 3)
    assert flower.combine_shares(shares[1:]) == b"s" * 32
    assert {len(share) for share in shares} == {52}


def test_sizes_are_those_of_the_bytes_that_flower_sends() -> None:
    """Else communication.csv is wrong."""
    asked = message()
    proto = message_to_proto(asked)
    assert flower.message_sizes(asked) == (len(proto.SerializeToString()), len(proto.content.SerializeToString()))
    alone = RecordDict({"arrays": asked.content["arrays"]})
    assert flower.record_size("arrays", alone.array_records["arrays"]) == len(flower.to_bytes(alone))


def test_a_clients_state_survives_as_bytes() -> None:
    """Else no checkpoint can be read: a ledger that is lost is privacy that is spent twice."""
    content = message().content
    again = flower.from_bytes(flower.to_bytes(content))
    assert again == content
    assert again.array_records["arrays"]["a.weight"].numpy().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_states_are_kept_as_bytes() -> None:
    content = message().content
    states = flower.States()
    states[3] = content
    assert states.blobs == {3: flower.to_bytes(content)}
    assert dict(states) == {3: content}
    assert states[3] is not content
    del states[3]
    assert states.get(3) is None


# Servers and nodes


def test_a_node_runs_the_installed_app_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever controls the server runs code of their own on the owner's machine."""
    runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    found = {}
    for name in ("get_load_client_app_fn", "install_from_fab"):
        monkeypatch.setattr(runtime, name, getattr(runtime, name))
        assert name in Path(str(runtime.__file__)).read_text().replace(f"def {name}", ""), "Flower never asks for it"
    program = importlib.import_module("flwr.supernode.cli.flwr_clientapp")
    monkeypatch.setattr(program, "flwr_clientapp", lambda: found.update(vars(runtime)))
    monkeypatch.setattr(sys, "argv", ["python"])
    flower.run_clientapp(test_all_metadata_is_known, message)  # type: ignore[arg-type]
    assert found["get_load_client_app_fn"] is test_all_metadata_is_known
    assert found["install_from_fab"] is message
    assert sys.argv == ["flwr-clientapp"]


def test_a_server_has_a_guard_and_run_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else anybody who reaches the port submits runs, and nobody gets a run's folder."""
    from flwr.superlink import extensions

    for name in ("get_middleware", "configure_app"):
        monkeypatch.setattr(extensions, name, getattr(extensions, name))
    monkeypatch.setattr(flower, "lengthen_task_lease", lambda: None)
    program = importlib.import_module("flwr.superlink.cli.flower_superlink")
    monkeypatch.setattr(program, "flower_superlink", lambda: None)
    told: list[FastAPI] = []
    flower.run_superlink(["guard"], told.append)  # type: ignore[list-item]
    app = FastAPI()
    extensions.configure_app(app)
    assert (extensions.get_middleware(), told) == (("guard",), [app])


def test_a_run_survives_a_minute_in_which_its_machine_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a suspended machine, or one that waits for its disk, loses its run: no heartbeat within 60 seconds."""
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.supercore.corestate import sql_corestate
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager

    monkeypatch.setattr(sql_corestate, "HEARTBEAT_PATIENCE", sql_corestate.HEARTBEAT_PATIENCE)
    state = SqlLinkState(":memory:", NoOpFederationManager(), ObjectStoreFactory().store())
    state.initialize()
    began, later = sql_corestate.now(), 0.0
    monkeypatch.setattr(sql_corestate, "now", lambda: began + timedelta(seconds=later))

    def survives(seconds: float) -> bool:
        nonlocal later
        task = state.get_tasks(run_ids=[state.create_run("", "", "", {}, "federation", None, None, "serverapp")])[0]
        assert state.claim_task(task.task_id)
        assert state.activate_task(task.task_id)
        later += seconds
        return bool(state.acknowledge_task_heartbeat(task.task_id))

    assert not survives(100)
    flower.lengthen_task_lease()
    assert survives(140)
    assert not survives(160)


def test_a_supernode_starts_no_other_programs() -> None:
    """Else a node lacks a refusal for a kind of task that brings its own code."""
    assert "flwr-clientapp" in flower.task_programs()


def test_programs_of_flower_are_where_they_were() -> None:
    """Else ``fedlora server`` and ``fedlora node`` do not start."""
    from flwr.supercore.app_utils import start_parent_process_monitor
    from flwr.supernode.cli.flower_supernode import flower_supernode

    assert callable(start_parent_process_monitor)
    assert callable(flower_supernode)


def test_an_app_without_code_can_be_packed() -> None:
    """Else ``fedlora run --on`` cannot submit."""
    about = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    with zipfile.ZipFile(io.BytesIO(flower.build_app(_without_files(about)))) as app:
        assert {name for name in app.namelist() if not name.startswith(".info")} == {"pyproject.toml"}


def _without_files(pyproject: str) -> str:
    before, _, rest = pyproject.partition("fab-include = [")
    return before + rest.partition("]\n")[2]


def test_flowers_config_names_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else ``--on NAME`` finds no server, or says of a missing one what Flower says of another mistake."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    text = '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:9"\ninsecure = true\n'
    (tmp_path / "config.toml").write_text(text)
    assert flower.read_connection("here") == flower.Connection("127.0.0.1:9", None, True)
    with pytest.raises(flower.NoConnectionError) as missing:
        flower.read_connection("there")
    assert str(missing.value) == ""


def test_the_control_api_speaks_over_http() -> None:
    """Else no command reaches a server."""
    import httpx

    control = flower.Control("http://127.0.0.1:9", False)
    for call in (control.nodes, control.runs, lambda: control.stop_run(1), lambda: control.register(b"key", "name")):
        with pytest.raises(httpx.TransportError):
            call()
    with pytest.raises(httpx.TransportError):
        control.start_run(b"app", "digest", {"config": "", "resume": False})
    control.close()


def test_flowers_errors_can_be_read() -> None:
    """Else a refusal is shown as its number alone."""
    from flwr.supercore.error import FlowerError

    assert flower.error_of("not JSON") is None
    assert hasattr(FlowerError, "from_json")


# That nothing else does


def _reaches(tree: ast.AST) -> list[str]:
    """Name what a module uses of Flower below its public interface."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0] == "flwr" and not name.startswith(PUBLIC):
                found.append(name)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(
            ("metadata.__dict__", "error.__dict__")
        ):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Message":
            found += [ast.unparse(node) for key in node.keywords if key.arg == "metadata"]
    return found


@pytest.mark.parametrize("package", ["fedlora", "strategies", "clients", "experiments"])
def test_nothing_else_reaches_below_flowers_interface(package: str) -> None:
    """A new Flower is met in fedlora/flower.py."""
    for path in (ROOT / package).rglob("*.py"):
        if path != ROOT / "fedlora" / "flower.py":
            assert _reaches(ast.parse(path.read_text(encoding="utf-8"))) == [], path


def test_that_check_sees_what_reaches_below() -> None:
    for line in (
        "from flwr.proto.node_pb2 import NodeInfo",
        "import flwr.supercore.run",
        "reply.metadata.__dict__['_src_node_id'] = 3",
        "Message(content, metadata=about)",
    ):
        assert len(_reaches(ast.parse(line))) == 1
    assert _reaches(ast.parse("from flwr.serverapp.strategy import Strategy\nMessage(content, reply_to=asked)")) == []


def test_pyproject_allows_the_versions_that_these_tests_saw() -> None:
    """A Flower that nobody tried is not installed."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (wanted,) = [line for line in dependencies if line.startswith("flwr[")]
    assert "<" in wanted


def test_simulated_clients_load_none_of_what_servers_need() -> None:
    """It takes seconds, in every process."""
    code = "import sys, fedlora.flower; print([m for m in sys.modules if m.startswith(('flwr.superlink', 'fastapi'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
