"""Language models of the families that people fine-tune, from a tiny config to an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fedlora
from tests import tiny
from tests.families import family_model
from tests.small_runs import World, world

DECODERS = (*("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi3", "olmo2"),)
NOISE = {"mode": "example", "noise_multiplier": 1.0, "max_grad_norm": 0.5, "target_delta": 1e-2}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("decoders")) as made:
        rng = np.random.default_rng(1)
        for name, count in (("questions", 16), ("asked", 4)):
            rows = [{key: " ".join(f"w{i}" for i in rng.integers(4, 50, 3)) for key in "pa"} for _ in range(count)]
            (made.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield made


def save_byte_tokenizer(folder: Path) -> None:
    """Save a byte-level BPE: transformers reads the tokenizer.json of this family as one of those."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=[*special.values()])
    tokenizer.train_from_iterator([" ".join(f"w{i}" for i in range(4, 50))], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def content(here: World, model_type: str) -> dict[str, Any]:
    folder = here.folder / model_type
    if not (folder / "config.json").exists():
        saved: Any = family_model(model_type, causal=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        saved.save_pretrained(folder)
        (save_byte_tokenizer if model_type == "qwen2" else tiny.save_tokenizer)(folder)
    return {
        "run": {"seed": 3, "rounds": 2},
        "model": {"name": str(folder), "task": "causal-lm", "max_length": 16},
        "data": {
            "name": str(here.folder / "questions.jsonl"),
            "test": str(here.folder / "asked.jsonl"),
            "prompt": "p",
            "answer": "a",
            "partition": {"clients": 2},
        },
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 4, "local_steps": 2},
        "privacy": NOISE,
        "evaluation": {"kind": "generate", "max_new_tokens": 4},
        "simulation": {"workers": 0, "cohort_size": 2},
    }


@pytest.mark.parametrize("model_type", DECODERS)
def test_from_a_config_to_an_answer(here: World, model_type: str) -> None:
    given = content(here, model_type)
    run = here.run(given)
    assert run.summary["epsilon"]["max"] > 0
    assert {"exact_match", "rougeL", "bleu"} <= set(run.summary["final"])
    again = here.run(given, stops=(1,)).arrays()
    assert all(torch.equal(array, again[name]) for name, array in run.arrays().items())
    assert any(array.any() for name, array in run.arrays().items() if "lora_B" in name)
    batch = {name: run.batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    stock: Any = AutoModelForCausalLM.from_pretrained(here.folder / model_type)
    adapted = PeftModel.from_pretrained(stock, str(run.folder / "adapter")).eval()
    merged, tokenizer = fedlora.load(run.folder)
    with torch.no_grad():
        for model in (adapted, merged):
            tiny.assert_close(model(**batch).logits[real], run.logits[real], 3e-5)
    prompt = tokenizer("w5 w6", return_tensors="pt")
    answers = [model.generate(**prompt, max_new_tokens=4, do_sample=False) for model in (adapted, merged)]
    assert torch.equal(*answers)
