"""What a skeleton was asked, the same model with weights is not asked again."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from fedlora import models
from fedlora.models import on_skeleton


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
