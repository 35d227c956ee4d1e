"""A tokenizer that does not fit the texts ends the run before it trains; what is cut is said. A node tells nobody."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedlora.config import Config, load_config
from fedlora.data.sources import materialise
from fedlora.data.tokens import prepare_data
from fedlora.errors import InputError
from tests import tiny

WORDS = ["good", "bad", "fine", "poor", "movie", "plot"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [f"{word} {other} movie" for word in WORDS for other in WORDS]


def tokenizer(words=WORDS, added=()) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special_tokens = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special_tokens)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    made.add_tokens(list(added))
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny BERT of 11 embeddings, without a tokenizer."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    shape = tiny.bert_config()
    shape.vocab_size = len(SPECIAL) + len(WORDS)
    BertForMaskedLM(BertConfig.from_dict(shape.to_dict())).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settings(folder, texts=TEXTS, *, max_length=16, **data) -> Config:
    rows = {"text": texts, "label": ["x", "y"] * (len(texts) // 2)}
    name = materialise(datasets.Dataset.from_dict(rows))
    model = {"name": str(folder), "max_length": max_length}
    content = {"model": model, "data": {"name": name, "partition": {"clients": 2}, **data}, "method": {"name": "fedit"}}
    return load_config(content)


def on_node(config: Config, file: Path, texts: list[str]) -> Config:
    """Return the config as a node makes it for its owner's file."""
    rows = ({"text": text, "label": "xy"[number % 2]} for number, text in enumerate(texts))
    file.write_text("\n".join(map(json.dumps, rows)))
    own = {"name": str(file), "test": "server", "label_names": ["x", "y"]}
    return config.model_copy(update={"data": config.data.model_copy(update=own)})


def test_a_model_without_its_tokenizer_files_is_refused(folder):
    """transformers makes an empty tokenizer of the model's type, to which every word is unknown."""
    with pytest.raises(
        InputError, match=r"^model\.name = .*100% of the .*; put the model's own tokenizer files beside"
    ):
        prepare_data(settings(folder))


def test_a_language_model_without_its_tokenizer_files_is_refused(folder):
    shape = GPT2Config(vocab_size=40, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    config = settings(folder)
    config = config.model_copy(update={"model": config.model.model_copy(update={"task": "causal-lm"})})
    with pytest.raises(InputError, match=r"^model\.name = .*tokenizer"):
        prepare_data(config)


@pytest.mark.parametrize(("known", "refused"), [(0, True), (1, True), (4, False), (6, False)])
def test_the_share_of_unknown_tokens_decides(folder, known, refused):
    tokenizer(WORDS[:known]).save_pretrained(folder)
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    unknown = 1 - known / 6
    if refused:
        with pytest.raises(InputError, match=r"does not know \d+% of the tokens of (train|test); put the model's own"):
            prepare_data(settings(folder, texts))
    else:
        notes = " ".join(prepare_data(settings(folder, texts)).notes)
        assert ("does not know" in notes) == (unknown > 0.05)


def test_tokens_beyond_the_embeddings_are_refused(folder):
    """They raised an IndexError in a worker; new embeddings would be noise that nobody trains."""
    tokenizer(added=["xtra1", "xtra2"]).save_pretrained(folder)
    prepare_data(settings(folder))  # no text has one
    with pytest.raises(InputError, match=r"gives train the token 12, but the model has 11 embeddings; save the model"):
        prepare_data(settings(folder, [f"{text} xtra2" for text in TEXTS]))


def test_padding_beyond_the_embeddings_is_not_used(folder):
    made = tokenizer()
    made.add_special_tokens({"pad_token": "<pad>", "eos_token": "[SEP]"})
    made.save_pretrained(folder)
    assert prepare_data(settings(folder)).train.pad_token_id == 3


def test_texts_that_all_look_alike_are_refused(folder):
    tokenizer([*WORDS, "x"]).save_pretrained(folder)
    inner = json.loads((folder / "tokenizer.json").read_text())
    inner["normalizer"] = {"type": "Replace", "pattern": {"Regex": ".+"}, "content": "movie"}
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    with pytest.raises(InputError, match="gives all texts of train the same tokens"):
        prepare_data(settings(folder))


def test_what_is_cut_is_said_once_more_from_the_cache(folder):
    tokenizer().save_pretrained(folder)
    texts = [*TEXTS[:-4], *["good " * 10] * 4]
    config = settings(folder, texts, max_length=5, test=settings(folder, TEXTS).data.name)
    for _ in range(2):
        data = prepare_data(config)
        # A row is [CLS] and three words and [SEP], or [CLS] and ten words and [SEP].
        assert data.notes == [
            "model.max_length = 5 cuts 4 of 36 rows of train: 28 of 208 tokens are dropped",
        ]
    assert not prepare_data(settings(folder)).notes
    with pytest.raises(InputError, match=r"^model\.max_length = 2: leaves only special tokens of 100% of the texts"):
        prepare_data(settings(folder, max_length=2))


@pytest.mark.parametrize("what", ["unknown", "beyond", "cut"])
def test_a_node_says_it_in_its_owners_log_alone(folder, tmp_path, what, caplog):
    """The server chose tokenizer and length: an error, or its absence, would answer its question about the texts."""
    tokenizer([] if what == "unknown" else WORDS, ["xtra1"]).save_pretrained(folder)
    texts = [f"{text} xtra1" for text in TEXTS] if what == "beyond" else TEXTS
    config = on_node(settings(folder, texts, max_length=4 if what == "cut" else 16), tmp_path / "own.jsonl", texts)
    if what == "unknown":
        # Without words there are 6 tokens, with one that was added.
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == 11
    with caplog.at_level(logging.INFO, logger="fedlora.data.tokens"):
        data = prepare_data(config)
    assert not data.notes
    assert len(data.train) == len(TEXTS)
    assert int(torch.as_tensor(data.train.tokens.max())) < 11
    expected = {
        "unknown": "does not know 100%",
        "beyond": "have no token that the model knows",
        "cut": "cuts 36 of 36 rows of train",
    }
    assert expected[what] in caplog.text
