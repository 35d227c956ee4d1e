"""What a skeleton was asked, the same model with weights is not asked again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from fedlora import models
from fedlora.kernels import activations
from fedlora.models import load_base, on_skeleton
from tests import tiny


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> BertConfig:
    monkeypatch.setattr(models, "_answers", {})
    return BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)


def test_a_loaded_model_uses_the_answer_of_its_skeleton(config: BertConfig) -> None:
    asked = []

    def answer(name: str) -> str:
        asked.append(name)
        return name

    with torch.device("meta"):
        skeleton = BertModel(config)
    loaded = BertModel(config)
    assert on_skeleton(skeleton, lambda: answer("skeleton"), "width") == "skeleton"
    assert on_skeleton(loaded, lambda: answer("loaded"), "width") == "skeleton"
    assert asked == ["skeleton"]


def test_a_loaded_model_is_asked_where_no_skeleton_was(config: BertConfig) -> None:
    loaded, asked = BertModel(config), []
    for _ in range(2):
        on_skeleton(loaded, lambda: asked.append(1), "width")
    assert len(asked) == 2  # what it answers is not kept: others may have other weights
    with torch.device("meta"):
        other = BertModel(BertConfig(**{**config.to_dict(), "intermediate_size": 16}))
    on_skeleton(other, lambda: "other", "width")
    assert on_skeleton(loaded, lambda: "own", "width") == "own"


def test_a_model_whose_modules_have_kernels_uses_the_answer_of_its_skeleton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a loaded model has other modules than its skeleton."""
    monkeypatch.setattr(models, "_answers", {})
    tiny.base_model("bert").save_pretrained(tmp_path)
    settings = tiny.settings("bert", model={"name": str(tmp_path)})
    skeleton, loaded = (load_base(settings, ["a", "b"], device) for device in ("meta", "cpu"))
    monkeypatch.setattr(activations, "triton", object())
    activations.use_activation_kernels(loaded)
    assert repr(loaded) != repr(skeleton)
    assert on_skeleton(skeleton, lambda: "skeleton", "width") == "skeleton"
    assert on_skeleton(loaded, lambda: "loaded", "width") == "skeleton"
