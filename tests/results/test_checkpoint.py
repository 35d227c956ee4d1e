"""The checkpoint: a round is there whole or not at all, and what comes back is what went in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.results import Checkpoint

names = st.text(st.characters(exclude_categories=["Cs"]))
finite = st.floats(allow_nan=False)
metrics = st.dictionaries(names, st.integers(-(2**62), 2**62) | finite | st.lists(finite) | st.lists(st.integers(0, 9)))
scalars = st.booleans() | st.integers(-(2**62), 2**62) | finite | names | st.binary()
configs = st.dictionaries(names, scalars | st.lists(names) | st.lists(st.binary()) | st.lists(st.booleans()))


def test_facts_and_arrays_come_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state.sqlite")
    arrays = {"a.b": torch.randn(3, 4), "scalar": torch.tensor(2.0), "d": torch.randn(2, dtype=torch.float64)}
    checkpoint["round"] = 3
    checkpoint["nested"] = {"x": [1, 2.5, None, "text"], "y": {}}
    checkpoint.set_arrays("trained", arrays)
    checkpoint.set_arrays("frozen", {})
    checkpoint.commit()
    checkpoint.close()
    again = Checkpoint(tmp_path / "state.sqlite")
    assert again.get("round") == 3
    assert again.get("nested") == {"x": [1, 2.5, None, "text"], "y": {}}
    assert again.get("absent", "default") == "default"
    assert again.get_arrays("absent") is None
    assert again.get_arrays("frozen") == {}
    restored = again.get_arrays("trained")
    assert restored is not None
    assert set(restored) == set(arrays)
    for name, array in arrays.items():
        assert restored[name].dtype == array.dtype
        assert torch.equal(restored[name], array)


def test_numbers_keep_every_bit(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state.sqlite")
    checkpoint["epsilon"] = 0.1 + 0.2
    checkpoint.set_arrays("x", {"x": torch.tensor([float("nan"), -0.0, 1e-45])})
    restored = checkpoint.get_arrays("x")
    assert checkpoint.get("epsilon") == 0.1 + 0.2
    assert restored is not None
    assert restored["x"].numpy().tobytes() == torch.tensor([float("nan"), -0.0, 1e-45]).numpy().tobytes()


def test_lines_keep_their_order_and_their_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state.sqlite")
    checkpoint.add_lines("a", ["1", "2"])
    checkpoint.add_lines("b", ["x"])
    checkpoint.add_lines("a", ["1"])
    checkpoint.add_lines("a", [])
    assert checkpoint.lines("a") == ["1", "2", "1"]
    assert checkpoint.lines("b") == ["x"]
    assert checkpoint.lines("c") == []


@given(metrics, configs)
def test_a_clients_state_comes_back(metric: dict[str, Any], config: dict[str, Any]) -> None:
    checkpoint = Checkpoint(Path(":memory:"))
    array = ArrayRecord({"x": Array(np.arange(6, dtype=np.int16).reshape(2, 3)), "s": Array(np.full((), 1.5))})
    state = RecordDict({"m": MetricRecord(metric), "c": ConfigRecord(config), "a": array})
    checkpoint.states[4] = state
    again = checkpoint.states[4]
    assert again["m"] == state["m"]
    assert again["c"] == state["c"]
    assert again["a"] == array
    assert [type(v) for v in again["c"].values()] == [type(v) for v in config.values()]
    checkpoint.close()


def test_states_are_a_mapping_by_client(tmp_path: Path) -> None:
    states = Checkpoint(tmp_path / "state.sqlite").states
    assert len(states) == 0
    assert states.get(3) is None
    for client in (7, 3, 11):
        states[client] = RecordDict({"c": ConfigRecord({"client": client})})
    assert list(states) == [3, 7, 11]
    states[3] = RecordDict({"c": ConfigRecord({"client": 33})})
    assert len(states) == 3
    assert states[3]["c"]["client"] == 33  # type: ignore[index]
    del states[7]
    assert 7 not in states
    with pytest.raises(KeyError):
        states[7]


def test_what_is_not_committed_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    checkpoint = Checkpoint(path)
    checkpoint["round"] = 1
    checkpoint.states[0] = RecordDict({"c": ConfigRecord({"calls": 1})})
    checkpoint.commit()
    checkpoint["round"] = 2
    checkpoint.states[0] = RecordDict({"c": ConfigRecord({"calls": 2})})
    checkpoint.add_lines("rounds.jsonl", ["{}"])
    checkpoint.close()
    again = Checkpoint(path)
    assert again.get("round") == 1
    assert again.states[0]["c"]["calls"] == 1  # type: ignore[index]
    assert again.lines("rounds.jsonl") == []


DIES = """
import os, sys
from pathlib import Path
import torch
from flwr.app import ConfigRecord, RecordDict
from fedlora.results import Checkpoint
checkpoint = Checkpoint(Path(sys.argv[1]))
for number in (1, 2):
    checkpoint["round"] = number
    for client in range(50):
        checkpoint.states[client] = RecordDict({"c": ConfigRecord({"round": number, "x": b"0" * 100_000})})
    checkpoint.set_arrays("trained", {"x": torch.full((1000, 1000), float(number))})
    checkpoint.add_lines("rounds.jsonl", [str(number)])
    if number == 1:
        checkpoint.commit()
# Much of the second round has been written to the file by now.
os._exit(9)
"""


def test_a_process_that_dies_in_a_round_leaves_the_round_before(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    assert subprocess.run([sys.executable, "-c", DIES, str(path)], check=False).returncode == 9
    checkpoint = Checkpoint(path)
    assert checkpoint.get("round") == 1
    assert checkpoint.lines("rounds.jsonl") == ["1"]
    trained = checkpoint.get_arrays("trained")
    assert trained is not None
    assert torch.equal(trained["x"], torch.ones(1000, 1000))
    assert {checkpoint.states[client]["c"]["round"] for client in range(50)} == {1}  # type: ignore[index]


def test_a_checkpoint_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    first = Checkpoint(path)
    with pytest.raises(InputError, match="another process"):
        Checkpoint(path)
    first["round"] = 1  # the first one is not disturbed
    first.commit()
    first.close()
    assert Checkpoint(path).get("round") == 1


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="damaged"):
        Checkpoint(path)


def test_arrays_beyond_what_one_value_holds_are_kept_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.results.checkpoint._PART_BYTES", 100)
    checkpoint = Checkpoint(tmp_path / "state.sqlite")
    large = {f"a{i}": torch.full((10,), float(i)) for i in range(7)}
    checkpoint.set_arrays("x", large)
    found = checkpoint.get_arrays("x")
    assert found is not None
    assert found.keys() == large.keys()
    assert all(torch.equal(found[name], large[name]) for name in large)
    # Fewer pieces than before leave none of the old ones behind.
    checkpoint.set_arrays("x", {"b": torch.ones(3)})
    assert list(checkpoint.get_arrays("x") or {}) == ["b"]
    checkpoint.set_arrays("x", {})
    assert checkpoint.get_arrays("x") == {}
    checkpoint.close()


def test_a_checkpoint_that_cannot_be_opened_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--resume = .*cannot be opened .*; make it writable$"):
        Checkpoint(tmp_path / "nowhere" / "state.sqlite")
