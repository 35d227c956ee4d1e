"""Experts on disk: stock PEFT loads them, and another mixture takes them in."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedlora.errors import InputError
from fedlora.experts import FULL
from fedlora.experts.expert import dense
from fedlora.experts.folder import FULL_FILE, folder_name, load_expert, save_expert
from fedlora.models import dense_weight
from tests import tiny
from tests.experts.test_mixture import drawn, logits, mixture_of, public_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stock_peft_loads_an_adapter(kind, tmp_path):
    mixture = mixture_of(kind, torch.float32)
    expert = drawn(mixture, "o", 3)
    save_expert(expert, mixture, tmp_path, "somewhere")
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"], facts["base_model_name_or_path"]) == (3, 3, "somewhere")
    loaded = PeftModel.from_pretrained(public_model(kind, torch.float32), str(tmp_path))
    by_hand = public_model(kind, torch.float32)
    with torch.no_grad():
        for path in mixture.projections():
            dense_weight(by_hand.get_submodule(path)).add_(dense(expert.update(path)))
    tiny.assert_close(logits(loaded), logits(by_hand))
    assert (logits(loaded) - logits(public_model(kind, torch.float32))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_full_expert_is_stock_weights(kind, tmp_path):
    mixture = mixture_of(kind)
    expert = drawn(mixture, "o", FULL)
    save_expert(expert, mixture, tmp_path, "somewhere")
    assert not (tmp_path / "adapter_config.json").exists()
    stock = public_model(kind)
    missing, unexpected = stock.load_state_dict(load_file(tmp_path / FULL_FILE), strict=False)
    assert not unexpected
    assert len(load_file(tmp_path / FULL_FILE)) == len(mixture.projections())
    assert missing
    path = next(iter(mixture.projections()))
    expected = dense_weight(mixture.blocks[0].public(next(iter(mixture.forms[0].projections)))) + dense(
        expert.update(path)
    )
    torch.testing.assert_close(dense_weight(stock.get_submodule(path)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [3, FULL])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_mixture_takes_a_saved_expert_in(kind, rank, tmp_path):
    first, second = mixture_of(kind), mixture_of(kind)
    expert = drawn(first, "misc+alt", rank)
    save_expert(expert, first, tmp_path, "somewhere")
    again = load_expert(tmp_path, second)
    assert (again.owner, again.rank, again.public_digest) == ("misc+alt", rank, first.public_digest)
    assert tiny.difference(again.arrays, expert.arrays) < 1e-12
    first.add_expert(expert)
    second.add_expert(again)
    torch.testing.assert_close(logits(first), logits(second), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="holds no expert"):
        load_expert(tmp_path / "nowhere", first)


@pytest.mark.parametrize("owner", ["comp", "misc+alt", "a/b", "..", ".x", "ü", "", "a b", "%2E"])
def test_every_owner_has_a_folder_of_its_own(owner, tmp_path):
    name = folder_name(owner)
    assert name
    assert "/" not in name
    assert not name.startswith(".")
    assert (tmp_path / name).parent == tmp_path
    others = {"comp", "misc+alt", "a/b", "..", ".x", "ü", "", "a b", "%2E"} - {owner}
    assert name not in {folder_name(other) for other in others}
    if owner in ("comp", "misc+alt", "a b"):
        assert name == owner


def test_long_names_become_folders_too(tmp_path):
    """A name of 40 Chinese characters is 360 when quoted; what tells two of them apart may come last."""
    names = {folder_name("漢" * 40 + end) for end in ("", "a", "b")}
    assert len(names) == 3
    for name in names:
        (tmp_path / name).mkdir()
    assert folder_name("x" * 255) == "x" * 255
