"""Tokens are made once, shared, and batched as the model wants them."""

import importlib
import logging
import sys

import datasets
import numpy as np
import pytest
import torch

from fedlora.assets import fetch
from fedlora.config import load_config
from fedlora.data import tokens
from fedlora.data.sources import materialise
from fedlora.data.tokens import TokenTable, prepare_data
from fedlora.errors import InputError
from fedlora.models import load_tokenizer
from fedlora.tasks import get_task

TEXTS = [" ".join(["word"] * (1 + row % 7)) for row in range(40)]


@pytest.fixture(scope="module")
def minilm():
    return str(fetch("minilm-l6"))


@pytest.fixture
def build(minilm, tmp_path, monkeypatch):
    """Return a function that makes a config on data in a cache of its own."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))

    def make(columns=None, *, model=None, max_length=16, task="sequence-classification", seed=0, **data):
        columns = columns or {"text": TEXTS, "label": ["x", "y"] * 20, "domain": ["one", "two"] * 20}
        partition = data.pop("partition", {"clients": 4})
        if "data_seed" in data:
            data["seed"] = data.pop("data_seed")
        return load_config(
            {
                "run": {"seed": seed},
                "model": {"name": model or minilm, "max_length": max_length, "task": task},
                "data": {"name": materialise(datasets.Dataset.from_dict(columns)), "partition": partition, **data},
                "method": {"name": "fedit"},
            }
        )

    return make


@pytest.fixture
def decoder(minilm, tmp_path):
    """A tokenizer's folder with an end-of-sequence token; there are no weights in it."""
    tokenizer = load_tokenizer(
        load_config(
            {"model": {"name": minilm}, "data": {"name": "x", "partition": {"clients": 1}}, "method": {"name": "fedit"}}
        )
    )
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "decoder")
    (tmp_path / "decoder" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    return str(tmp_path / "decoder")


def test_batches_of_a_classifier(build):
    config = build()
    data = prepare_data(config)
    assert (len(data.train), len(data.test), data.validation, data.public) == (36, 4, None, None)
    assert data.label_names == ["x", "y"]
    assert data.domain_names == ["one", "two"]
    np.testing.assert_array_equal(data.train.domain, data.train.labels)
    tokenizer = load_tokenizer(config)
    rows = np.array([30, 2, 2, 17])
    batch = data.train.batch(rows)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, data.train.lengths[rows].max())
    assert batch["labels"].tolist() == data.train.labels[rows].tolist()
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        length = data.train.lengths[row]
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert tokenizer.decode(ids[:length]) == "[CLS] " + " ".join(["word"] * (length - 2)) + " [SEP]"
        assert (ids[length:] == tokenizer.pad_token_id).all()


def test_an_empty_batch(build):
    batch = prepare_data(build()).train.batch(np.array([], np.int64))
    assert batch["input_ids"].shape == (0, 0)
    assert batch["labels"].shape == (0,)


def test_rows_are_cut_to_max_length(build):
    data = prepare_data(build(max_length=4))
    assert data.train.lengths.max() == 4
    assert data.train.batch(np.arange(36))["input_ids"].shape == (36, 4)


def test_the_partition_and_its_counts(build):
    data = prepare_data(build())
    assert len(data.partition) == 4
    assert data.client_names == ["0", "1", "2", "3"]
    assert sorted(np.concatenate(list(data.partition)).tolist()) == list(range(36))
    assert data.partition.sizes.tolist() == [len(rows) for rows in data.partition]
    assert data.partition[-1].tolist() == data.partition[3].tolist() == data.partition[2:][1].tolist()
    with pytest.raises(IndexError):
        data.partition[4]
    counts = data.label_counts()
    assert counts.shape == (4, 2)
    assert counts.sum(axis=1).tolist() == data.partition.sizes.tolist()


def test_the_cache_is_shared_and_its_key_sees_what_matters(build, monkeypatch):
    first = prepare_data(build())
    others = [
        build(max_length=8),
        build(seed=1),
        build({"text": TEXTS, "label": [1, 2] * 20}),
    ]
    assert len({first.folder, *(prepare_data(other).folder for other in others)}) == 4
    monkeypatch.setattr(tokens, "_build", lambda *_: pytest.fail("made again"))
    again = prepare_data(build())
    assert again.folder == first.folder
    assert isinstance(again.train.tokens, np.memmap)
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)


def test_runs_of_other_partitions_and_seeds_share_the_tokens(build, monkeypatch):
    def divided(data):
        return [rows.tolist() for rows in data.partition]

    alike = {"data_seed": 3, "partition": {"clients": 4}}
    first = prepare_data(build(**alike))
    monkeypatch.setattr(tokens, "_build", lambda *_: pytest.fail("made again"))
    others = [build(**alike, seed=1), build(**alike | {"partition": {"clients": 5}}), build(**alike, client_test=0.25)]
    found = [prepare_data(config) for config in others]
    assert all(data.folder == first.folder for data in found)
    assert len({str(divided(data)) for data in (first, *found)}) == 4
    assert found[1].client_names == ["0", "1", "2", "3", "4"]
    assert first.client_test is None
    assert [len(rows) for rows in found[2].client_test] == [2, 2, 2, 2]
    assert divided(prepare_data(build(**alike))) == divided(first)


def test_a_damaged_cache_is_named(build):
    folder = prepare_data(build()).folder
    (folder / "train.tokens.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=rf"data\.name.*delete {folder} and run again"):
        prepare_data(build())


def test_prompts_have_no_loss_and_lost_answers_are_dropped(build, decoder, caplog):
    columns = {"prompt": ["word"] * 30 + ["word " * 20], "answer": ["yes no"] * 31}
    config = build(columns, model=decoder, task="causal-lm", prompt="prompt", answer="answer", max_length=8)
    with caplog.at_level(logging.WARNING, logger="fedlora.data.tokens"):
        data = prepare_data(config)
    assert "1 of " in caplog.text
    assert len(data.train) + len(data.test) == 30
    assert data.label_names is None
    assert data.label_counts().shape == (4, 1)
    batch = data.train.batch(np.array([0]))
    tokenizer = load_tokenizer(config)
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] word yes no [SEP]"
    assert batch["labels"][0].tolist() == [-100, -100, *batch["input_ids"][0, 2:].tolist()]
    with pytest.raises(InputError) as caught:
        prepare_data(build(columns, model=decoder, task="causal-lm", prompt="prompt", answer="answer", max_length=2))
    assert caught.value.field == "model.max_length"


def test_plain_text_has_loss_everywhere_but_on_padding(build, decoder):
    data = prepare_data(build({"text": TEXTS}, model=decoder, task="causal-lm"))
    batch = data.train.batch(np.arange(10))
    expected = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    assert torch.equal(batch["labels"], expected)
    # One end of sequence, although this tokenizer writes one itself.
    assert (batch["input_ids"] == 102).sum(dim=1).tolist() == [1] * 10


def test_domains_of_rows_that_stay(build, decoder):
    columns = {"prompt": ["word " * 20, "word"] * 20, "answer": ["a"] * 40, "domain": ["long", "short"] * 20}
    data = prepare_data(build(columns, model=decoder, task="causal-lm", prompt="prompt", answer="answer", max_length=8))
    assert {data.domain_names[domain] for domain in data.train.domain} == {"short"}
    assert sum(data.partition.sizes) == len(data.train)
    # Rows of a partition are those of the tokens, also where only the partition is made anew.
    columns |= {"domain": ["none", "some"] * 20}
    by_owner = {"kind": "natural", "column": "domain"}
    data = prepare_data(
        build(
            columns,
            model=decoder,
            task="causal-lm",
            prompt="prompt",
            answer="answer",
            max_length=8,
            partition=by_owner,
        )
    )
    assert data.client_names == ["some"]
    assert np.concatenate(list(data.partition)).tolist() == list(range(len(data.train)))


def test_max_length_beyond_the_model_is_named(build):
    with pytest.raises(InputError) as caught:
        prepare_data(build(max_length=513))
    assert caught.value.field == "model.max_length"


def test_a_table_needs_something_to_learn():
    with pytest.raises(ValueError, match="neither labels nor answers"):
        TokenTable(np.arange(3), np.array([0, 3]), None, None, None, 0, get_task("causal-lm")).batch([0])


def test_an_edited_task_makes_its_tokens_anew(build, tmp_path, monkeypatch):
    file = tmp_path / "own_task.py"
    text = """
from fedlora.tasks.sequence_classification import SequenceClassification

class Own(SequenceClassification):
    name = "own"

    def label_array(self, labels):
        return super().label_array(labels) + {added}
"""
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for added in (0, 10):
        file.write_text(text.format(added=added))
        importlib.invalidate_caches()
        sys.modules.pop("own_task", None)
        task = importlib.import_module("own_task").Own()
        for place in ("data.tokens", "data.sources", "data.partition", "models", "config.examples"):
            monkeypatch.setattr(f"fedlora.{place}.get_task", lambda name, task=task: task)
        found.append(prepare_data(build(task="own")).train.labels.min())
    assert found == [0, 10]
