"""Ctrl-C amid a change of the model that a process keeps: the next run does not go on with half of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora import simulate
from fedlora.arrays import Arrays
from fedlora.experts import expert_model
from tests.llama_runs import LlamaRuns, lines

METHOD: dict[str, Any] = {"name": "flexmore", "ranks": {"o0": 1, "o1": 2, "o2": 3, "o3": 1}}


def experts(folder: Path) -> dict[str, Arrays]:
    return {path.parent.name: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("call", [9, 14, 19, 24])
def test_a_run_that_was_stopped_while_a_model_took_on_a_rank_is_resumed_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    runs = LlamaRuns(tmp_path)
    whole = runs.run(method=METHOD, run={"rounds": 2})
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    content = runs.config(method=METHOD, run={"rounds": 2}).model_dump(exclude_none=True)
    made = [0]

    class Stopped(expert_model.FactoredLinear):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made[0] += 1
            if made[0] == call:
                raise KeyboardInterrupt
            super().__init__(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(expert_model, "FactoredLinear", Stopped)
        with pytest.raises(KeyboardInterrupt):
            simulate(content, output=tmp_path / "stopped")
    resumed = simulate(content, output=tmp_path / "stopped", resume=True)
    assert not any(line["failed"] for line in lines(resumed))
    a, b = experts(whole.folder), experts(resumed.folder)
    assert a.keys() == b.keys()
    assert all(torch.equal(array, b[owner][name]) for owner, arrays in a.items() for name, array in arrays.items())
