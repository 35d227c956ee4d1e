"""Every source gives the same examples; every mistake names its key."""

import json

import datasets
import numpy as np
import pytest

from fedlora.config import load_config
from fedlora.data.sources import load_examples, materialise, source_identity
from fedlora.errors import InputError, LabelError

TEXTS = [f"text number {row}" for row in range(40)]
WORDS = ["good" if row % 3 else "bad" for row in range(40)]


def config(name, *, seed=0, task="sequence-classification", partition=None, data_seed=None, **data):
    return load_config(
        {
            "run": {"seed": seed},
            "model": {"name": "x", "task": task},
            "data": {"name": str(name), "partition": {"clients": 2, **(partition or {})}, "seed": data_seed, **data},
            "method": {"name": "fedit"},
        }
    )


def table(labels=WORDS, **columns):
    return datasets.Dataset.from_dict({"text": TEXTS[: len(labels)], "label": labels, **columns})


def write(content, path):
    """Save a data set in the format of the path's suffix; a path without suffix is a ``datasets`` folder."""
    frame = content.to_pandas()
    if path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(content)))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        content.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "folder"])
@pytest.mark.parametrize("labels", [WORDS, [row % 3 for row in range(40)]], ids=["words", "numbers"])
def test_every_format_gives_the_same(tmp_path, name, labels):
    examples = load_examples(config(write(table(labels), tmp_path / name)))
    assert examples.label_names == [str(label) for label in sorted(set(labels))]
    assert (len(examples.train), len(examples.test)) == (36, 4)
    rows = [*examples.train, *examples.test]
    found = {row["text"]: examples.label_names[row["label"]] for row in rows}
    assert found == dict(zip(TEXTS, map(str, labels), strict=True))


def test_the_hold_out_and_the_subset_follow_the_seed(tmp_path):
    path = write(table(), tmp_path / "a.csv")
    first, again, other = (load_examples(config(path, seed=seed, max_examples=20)) for seed in (0, 0, 1))
    assert first.train["text"][:] == again.train["text"][:]
    assert first.test["text"][:] == again.test["text"][:]
    assert first.test["text"][:] != other.test["text"][:]
    assert len(first.train) == 20
    assert not set(first.train["text"]) & set(first.test["text"])
    # The subset leaves the test set as it is, and the rows in their order.
    assert first.test["text"][:] == load_examples(config(path)).test["text"][:]
    assert first.train["text"][:] == sorted(first.train["text"], key=TEXTS.index)


def test_a_share_of_train_validates_and_the_datas_own_seed_holds_out_alike(tmp_path):
    path = write(table(), tmp_path / "a.csv")
    first, other = (load_examples(config(path, seed=seed, validation=0.25, data_seed=3)) for seed in (0, 1))
    assert (len(first.train), len(first.validation), len(first.test)) == (27, 9, 4)
    parts = [set(split["text"]) for split in (first.train, first.validation, first.test)]
    assert set().union(*parts) == set(TEXTS)
    for split in ("train", "validation", "test"):
        assert getattr(first, split)["text"][:] == getattr(other, split)["text"][:]
    # The test set is what it is without validation; another seed of the data gives another.
    assert load_examples(config(path, seed=3)).test["text"][:] == first.test["text"][:]
    assert load_examples(config(path, validation=0.25)).validation["text"][:] != first.validation["text"][:]


def test_a_share_of_train_is_public_and_nobody_elses(tmp_path):
    path = write(table(), tmp_path / "a.csv")
    found = load_examples(config(path, validation=0.25, public=1 / 3))
    assert (len(found.train), len(found.validation), len(found.public), len(found.test)) == (18, 9, 9, 4)
    assert set().union(*(set(part["text"]) for part in (found.train, found.validation, found.public))) == (
        set(TEXTS) - set(found.test["text"])
    )
    # What validates is the same with and without it.
    assert load_examples(config(path, validation=0.25)).validation["text"][:] == found.validation["text"][:]
    with pytest.raises(InputError, match=r"data.public = 0.001: leaves 36 of 36 training examples and 0 for the"):
        load_examples(config(path, public=0.001))


def test_a_share_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data.validation = 0.001: leaves 36 of 36 training examples"):
        load_examples(config(write(table(), tmp_path / "a.csv"), validation=0.001))


def test_numbers_are_sorted_by_value_and_class_labels_by_their_order(tmp_path):
    assert load_examples(config(write(table([10, 9, 2] * 10), tmp_path / "a.csv"))).label_names == ["2", "9", "10"]
    named = table([0, 1] * 20).cast_column("label", datasets.ClassLabel(names=["zebra", "ant"]))
    examples = load_examples(config(write(named, tmp_path / "folder")))
    assert examples.label_names == ["zebra", "ant"]
    assert set(examples.train["label"]) == {0, 1}


def test_splits_files_and_class_labels_mix(tmp_path):
    names = datasets.ClassLabel(names=["good", "bad"])
    train = table([0, 1] * 20).cast_column("label", names)
    splits = {"train": train, "test": train.select(range(4)), "dev": train.select(range(6))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "folder")
    other = write(table(["bad", "good", "bad"]), tmp_path / "other.csv")
    examples = load_examples(config(tmp_path / "folder", validation="dev", public=str(other)))
    assert [len(split) for split in (examples.train, examples.test, examples.validation)] == [40, 4, 6]
    assert examples.public["label"][:] == [1, 0, 1]
    assert len(load_examples(config(tmp_path / "folder", test=str(other))).test) == 3
    assert len(load_examples(config(tmp_path / "folder", train="dev")).train) == 6


def test_labels_written_as_text_in_one_file_and_numbers_in_the_other(tmp_path):
    path = write(table([3, 4] * 20), tmp_path / "a.csv")
    other = write(table(["4", "3"]), tmp_path / "b.jsonl")
    assert load_examples(config(path, test=str(other))).test["label"][:] == [1, 0]


def test_rows_without_text_are_dropped_and_na_is_a_word(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nNA,null\n  ,x\n,x\nnone,None\nok,null\nok,None\n")
    examples = load_examples(config(path, test=str(path)))
    assert examples.train["text"][:] == ["NA", "none", "ok", "ok"]
    assert examples.label_names == ["None", "null"]


def test_causal_lm_takes_text_or_prompt_and_answer(tmp_path):
    path = write(table(), tmp_path / "a.jsonl")
    examples = load_examples(config(path, task="causal-lm"))
    assert examples.label_names is None
    assert examples.train.column_names == ["text"]
    examples = load_examples(config(path, task="causal-lm", prompt="text", answer="label"))
    assert examples.train.column_names == ["prompt", "answer"]


def test_domain_and_the_column_of_the_partition_are_kept(tmp_path):
    owners = [f"owner {row % 5}" for row in range(40)]
    path = write(table(domain=["a", "b"] * 20, owner=owners, more=TEXTS), tmp_path / "a.parquet")
    examples = load_examples(config(path, partition={"kind": "natural", "column": "owner"}))
    assert sorted(examples.train.column_names) == ["domain", "label", "partition", "text"]
    assert "partition" not in examples.test.column_names
    by_label = load_examples(config(path, partition={"kind": "natural", "column": "label"}))
    assert set(by_label.train["partition"]) == {"good", "bad"}


def test_a_domain_without_a_name_gets_one(tmp_path):
    """Owners of experts are called after their domains, and no name is none."""
    path = write(table(domain=["a", "", " ", None] * 10), tmp_path / "a.parquet")
    examples = load_examples(config(path))
    assert set(examples.train["domain"]) | set(examples.test["domain"]) == {"a", "(none)"}


@pytest.mark.parametrize(
    ("name", "rows", "held", "classes"),
    [
        ("rotten-tomatoes", 11528, 1280, 2),
        ("20newsgroups", 11293, 7528, 20),
        ("reuters-r8", 5485, 2189, 8),
        ("reuters-r52", 6532, 2568, 52),
    ],
)
def test_assets(name, rows, held, classes):
    examples = load_examples(config(f"asset:{name}"))
    assert (len(examples.train), len(examples.test), len(examples.label_names)) == (rows, held, classes)
    if name == "20newsgroups":
        assert set(examples.test["domain"]) == {"comp", "rec", "sci", "talk", "misc+alt"}


def bad_files(folder):
    """Yield a name, the config's data section and the key that must be named."""
    good = write(table(owner=TEXTS), folder / "good.csv")
    yield "column of texts", {"name": good, "text": "txt"}, "data.text"
    yield "column of labels", {"name": good, "label": "y"}, "data.label"
    yield "column of owners", {"name": good, "partition": {"column": "z"}}, "data.partition.column"
    yield "column of prompts", {"name": good, "task": "causal-lm", "prompt": "p", "answer": "text"}, "data.prompt"
    yield "column of answers", {"name": good, "task": "causal-lm", "prompt": "text", "answer": "a"}, "data.answer"
    yield "split", {"name": good, "train": "no"}, "data.train"
    yield "test", {"name": good, "test": "no"}, "data.test"
    yield "validation", {"name": good, "validation": "no.csv"}, "data.validation"
    yield "public", {"name": good, "public": "asset:no"}, "data.public"
    yield "no file", {"name": folder / "no.csv"}, "data.name"
    yield "no hub", {"name": "no-org/no-data"}, "data.name"
    yield "no asset", {"name": "asset:no"}, "data.name"
    yield "model asset", {"name": "asset:minilm-l6"}, "data.name"
    yield "empty folder", {"name": folder / "empty"}, "data.name"
    contents = {
        "a.txt": (b"text,label\na,b\n", "data.name"),
        "empty.csv": (b"", "data.name"),
        "header.csv": (b"text,label\n", "data.name"),
        "cells.csv": (b"text,label\na,b\nc,d,e,f\n", "data.name"),
        "more-cells.csv": (b"text,label\na,b,c\nd,e,f\n", "data.name"),
        "bytes.csv": (b"text,label\n\xff\xfe\x00,b\n", "data.name"),
        "bad.jsonl": (b'{"text": "a", "label": 1}\n{"text": \n', "data.name"),
        "list.json": (b"[1, 2]", "data.name"),
        "empty.jsonl": (b"", "data.name"),
        "bad.parquet": (b"PAR1 not really", "data.name"),
        "blank.csv": (b"text,label\n ,b\n,c\n", "data.name"),
        "numbers.csv": (b"text,label\n1,b\n2,c\n", "data.text"),
        "gap.csv": (b"text,label\na,b\nb,\nc,c\n", "data.label"),
        "fraction.csv": (b"text,label\na,0.5\nb,1\nc,2\n", "data.label"),
        "one.csv": (b"text,label\na,b\nb,b\nc,b\n", "data.label"),
        "lists.jsonl": (b'{"text": "a", "label": [1]}\n{"text": "b", "label": [2]}\n', "data.label"),
    }
    for name, (content, field) in contents.items():
        (folder / name).write_bytes(content)
        yield name, {"name": folder / name}, field
    (folder / "unseen.csv").write_text("text,label\na,good\nb,strange\n")
    yield "unseen label", {"name": good, "test": str(folder / "unseen.csv")}, "data.test"


def test_mistakes_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for what, data, field in bad_files(tmp_path):
        with pytest.raises(InputError) as caught:
            load_examples(config(**data))
        assert caught.value.field == field, f"{what}: {caught.value}"
        assert "\n" not in str(caught.value)
        if "column" in what:
            assert "columns: text, label, owner" in str(caught.value)
    with pytest.raises(InputError, match=r"line 3 of gap\.csv"):
        load_examples(config(tmp_path / "gap.csv"))


def test_in_memory_data_is_saved_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    first = materialise(table())
    assert materialise(table().select(np.arange(40))) == first
    assert materialise(table([*WORDS[1:], "bad"])) != first
    assert load_examples(config(first)).label_names == ["bad", "good"]
    splits = materialise({"train": table(), "test": table().select(range(4))})
    assert len(load_examples(config(splits)).test) == 4
    with pytest.raises(InputError, match=r"give a datasets\.Dataset"):
        materialise({"train": [1, 2]})


def test_the_identity_follows_the_content(tmp_path):
    path = write(table(), tmp_path / "a.csv")
    before = source_identity(config(path))
    assert source_identity(config(path)) == before
    path.write_text(path.read_text() + "one more,good\n")
    assert source_identity(config(path)) != before
    json.dumps(source_identity(config("asset:reuters-r8", test=str(path))))


def test_labels_may_be_named_in_order(tmp_path):
    path = write(table(), tmp_path / "a.csv")
    examples = load_examples(config(path, label_names=["good", "bad", "unseen"]))
    assert examples.label_names == ["good", "bad", "unseen"]
    found = {row["text"]: examples.label_names[row["label"]] for row in [*examples.train, *examples.test]}
    assert found == dict(zip(TEXTS, WORDS, strict=True))
    with pytest.raises(LabelError, match=r"'bad' is not in data\.label_names"):
        load_examples(config(path, label_names=["good", "evil"]))
    with pytest.raises(InputError, match=r"data\.label_names = .*twice"):
        config(path, label_names=["good", "good"])


def test_a_format_may_be_named(tmp_path):
    path = write(table(), tmp_path / "a.csv").rename(tmp_path / "a.txt")
    assert len(load_examples(config(path, format="csv")).train) == 36


def test_a_server_of_nodes_holds_no_training_examples(tmp_path):
    test = write(table(), tmp_path / "test.jsonl")
    examples = load_examples(config("nodes", test=str(test)))
    assert examples.train is None
    assert examples.label_names == ["bad", "good"]
    assert examples.test["text"] == TEXTS
    assert load_examples(config("nodes", test=str(test), label_names=["good", "bad"])).label_names == ["good", "bad"]
    with pytest.raises(InputError, match=r"data\.test = None: is required"):
        config("nodes")


def test_a_node_trains_on_all_of_its_examples(tmp_path):
    own = write(table(["bad"] * 40), tmp_path / "own.csv")
    examples = load_examples(config(own, test="server", label_names=["bad", "good"]))
    assert examples.test is None
    assert examples.train["text"] == TEXTS
    assert set(examples.train["label"]) == {0}


def test_a_subset_of_a_set_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def load(name, subset):
        asked.append((name, subset))
        return datasets.DatasetDict(train=table(), validation_matched=table(WORDS[:10]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    given = config("glue", subset="mnli", test="validation_matched")
    examples = load_examples(given)
    assert (len(examples.train), len(examples.test)) == (40, 10)
    assert set(asked) == {("glue", "mnli")}
    assert source_identity(given) != source_identity(config("glue", subset="qqp", test="validation_matched"))
    for name in (write(table(), tmp_path / "a.csv"), "asset:rotten-tomatoes"):
        with pytest.raises(
            InputError, match=r"data\.subset = 'mnli': is a part of a data set on the hub, but .* is none"
        ):
            load_examples(config(name, subset="mnli"))
