"""Equal bits do not depend on where weights lie in memory, as products do on some processors."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.alignment import ALIGNMENT, align_weights, aligned
from fedlora.communication.wire import decode, encode
from fedlora.experts.mixture import Mixture, load_mixture
from fedlora.models import load_base
from fedlora.results.checkpoint import Checkpoint
from tests import tiny
from tests.unaligned import unaligned_weights

BATCH = {"input_ids": torch.arange(1, 13).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


@pytest.fixture(params=[8, 24, 40], autouse=True)
def weight_offset(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every weight that these tests read lies at this address modulo 64, and products round by it."""
    with unaligned_weights.at(request.param):
        yield


def lies_at(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() % ALIGNMENT


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def test_the_fixture_moves_weights_and_rounds_products(tmp_path: Path) -> None:
    model = tiny.base_model("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {lies_at(p) for p in loaded.parameters()} == {unaligned_weights.offset}
    assert not torch.equal(logits(loaded), logits(model))
    tiny.assert_close(logits(loaded), logits(model), 1e-5)
    assert torch.equal(logits(align_weights(loaded)), logits(model))


def test_aligned_copies_only_what_is_not() -> None:
    room = torch.arange(64.0)
    assert aligned(room) is room
    assert aligned(room[16:]).data_ptr() == room[16:].data_ptr()
    for start in (1, 2, 15, 17):
        there = aligned(room[start:])
        assert lies_at(there) == 0
        assert torch.equal(there, room[start:])
    assert aligned(room[3:3]).shape == (0,)


def test_tied_weights_stay_tied() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)])
    model[0].weight = model[1].weight = torch.nn.Parameter(torch.randn(17)[1:].reshape(4, 4))
    align_weights(model)
    assert model[0].weight is model[1].weight
    assert lies_at(model[0].weight) == 0


@pytest.mark.parametrize("kind", ["bert", "mean"])
def test_a_base_model_computes_what_its_weights_do_elsewhere(kind: str, tmp_path: Path) -> None:
    stock = tiny.base_model("bert")
    stock.save_pretrained(tmp_path)
    pooling = "mean" if kind == "mean" else "default"
    config = tiny.settings("bert", model={"name": str(tmp_path), "max_length": 8, "pooling": pooling})
    loaded: Any = load_base(config, ["a", "b"])
    assert {lies_at(p) for p in (*loaded.parameters(), *loaded.buffers())} == {0}
    again = tiny.base_model("bert")
    encoder = loaded.encoder if kind == "mean" else loaded.bert
    with torch.no_grad():
        hidden = [m(**BATCH).last_hidden_state for m in (encoder, again.bert)]
    assert torch.equal(*hidden)


def test_a_merged_classifier_loads_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny.base_model("mean")
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {lies_at(p) for p in again.parameters()} == {0}
    assert torch.equal(logits(again), logits(model))
    both, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert {lies_at(p) for p in both.parameters()} == {0}


def test_a_mixture_loads_to_the_same_bits(tmp_path: Path) -> None:
    mixture = Mixture.of(tiny.base_model("llama")).eval()
    mixture.save_pretrained(tmp_path)
    for again in (load_mixture(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")):
        assert torch.equal(logits(again), logits(mixture))


def test_what_messages_and_checkpoints_hold_is_aligned(tmp_path: Path) -> None:
    arrays = {f"x{i}": torch.randn(i, 3) for i in (1, 2, 5, 1000)} | {"none": torch.zeros(0, 2)}
    file = io.BytesIO()
    np.save(file, np.asfortranarray(np.arange(12.0, dtype=np.float32).reshape(3, 4)))
    record = encode(arrays)
    record["fortran"] = Array("float32", (3, 4), "numpy.ndarray", file.getvalue())
    assert isinstance(record, ArrayRecord)
    assert {lies_at(a) for a in decode(record).values()} == {0}
    checkpoint = Checkpoint(tmp_path / "state.sqlite")
    checkpoint.set_arrays("trained", arrays)
    checkpoint.commit()
    found = checkpoint.get_arrays("trained")
    checkpoint.close()
    assert found is not None
    assert {lies_at(a) for a in found.values()} == {0}


def test_other_processes_read_weights_where_the_option_says(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100)}, tmp_path / "weights.safetensors")
    script = "import sys; from safetensors.torch import load_file; print(load_file(sys.argv[1])['x'].data_ptr() % 64)"
    changes = unaligned_weights.environment(unaligned_weights.offset)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "weights.safetensors"],
        env=os.environ | changes, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == unaligned_weights.offset
