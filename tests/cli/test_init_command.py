"""``fedlora init``: what it asks, what it finds out by itself, and that what it writes is a config that runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest

from fedlora.config import Config, load_config, unused_keys
from tests.command import Done, fedlora


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text(
        "review,stars,clinic\n" + "".join(f"word {i},{'good' if i % 2 else 'bad'},{'abc'[i % 3]}\n" for i in range(9))
    )
    return tmp_path


def written(*arguments: object) -> Config:
    done = fedlora("init", *arguments)
    assert (done.code, done.err) == (0, "")
    file = next((str(a) for a in arguments if str(a).endswith(".toml")), "fedlora.toml")
    assert done.out.splitlines()[-1] == f"{file} is written; run it with: fedlora run {file}"
    config = load_config(file)
    assert unused_keys(config) == []
    return config


def test_without_a_terminal_nothing_is_asked() -> None:
    config = written()
    assert (config.model.name, config.data.name) == ("asset:minilm-l6", "asset:rotten-tomatoes")
    assert (config.data.partition.clients, config.privacy.target_epsilon) == (10, 8.0)
    assert config.model.pooling == "mean"


def test_it_says_when_nothing_could_be_asked() -> None:
    told = "nothing was asked, since standard input is not a terminal"
    assert told in fedlora("init", "one.toml").out
    assert told not in fedlora("init", "two.toml", "--yes").out


def test_columns_are_found_by_their_names() -> None:
    config = written("mine.toml", "--data", "reviews.csv")
    assert (config.data.text, config.data.label) == ("review", "stars")
    assert config.model.task == "sequence-classification"
    assert config.run.name == "mine"


def test_options_say_all_of_it() -> None:
    options = ["--data", "reviews.csv", "--text", "clinic", "--label", "stars", "--model", "models/own"]
    config = written(*options, "--owner", "clinic", "--epsilon", "0")
    assert (config.data.text, config.model.name, config.model.pooling) == ("clinic", "models/own", "default")
    assert (config.data.partition.kind, config.data.partition.column) == ("natural", "clinic")
    assert config.privacy.mode == "none"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def answered(monkeypatch: pytest.MonkeyPatch, *answers: str, options: tuple[str, ...] = ()) -> Done:
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{answer}\n" for answer in answers)))
    return fedlora("init", *options)


def test_on_a_terminal_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["reviews.csv", "", "", "models/own", "clinic", "3"]  # data, text, label, model, owner, epsilon
    done = answered(monkeypatch, *answers)
    assert done.code == 0, done.err
    assert "reviews.csv: 9 rows, columns review, stars, clinic" in done.out
    assert "owner clinic (3 owners)" in done.out
    config = load_config("fedlora.toml")
    assert (config.data.text, config.data.label) == ("review", "stars")
    assert (config.data.partition.column, config.privacy.target_epsilon) == ("clinic", 3.0)
    assert config.model.name == "models/own"


@pytest.mark.parametrize(
    ("rows", "task", "columns"),
    [
        ([{"text": "a", "score": 0.5}, {"text": "b", "score": 2}], "regression", {"text": "text", "label": "score"}),
        ([{"text": "a", "stars": 1}, {"text": "b", "stars": 2}], "sequence-classification", {"label": "stars"}),
        ([{"note": "a"}, {"note": "b"}], "causal-lm", {"text": "note"}),
        ([{"prompt": "a", "answer": "b"}], "causal-lm", {"prompt": "prompt", "answer": "answer"}),
        ([{"messages": [{"role": "user", "content": "a"}]}], "causal-lm", {"messages": "messages"}),
    ],
)
def test_the_task_follows_from_the_columns(rows: list[object], task: str, columns: dict[str, str]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = written("--data", "rows.jsonl", "--model", "m")
    assert config.model.task == task
    assert {key: getattr(config.data, key) for key in columns} == columns


def table(file: str, head: str, rows: int = 60, values: tuple[str, ...] = ("good", "bad")) -> None:
    """Write a file with an id, a note and, as ``head`` names them, columns of the values and of three sites."""
    lines = [f"{i},a note of some length {i},{values[i % len(values)]},{'abc'[i % 3]}" for i in range(rows)]
    Path(file).write_text("\n".join([head, *lines]) + "\n")


def test_the_only_column_with_few_values_is_the_label() -> None:
    table("notes.csv", "id,note,opinion,site")
    config = written("--data", "notes.csv", "--owner", "site")
    assert (config.data.text, config.data.label) == ("note", "opinion")
    assert config.model.task == "sequence-classification"


def test_of_several_columns_with_few_values_nobody_guesses() -> None:
    table("notes.csv", "id,note,opinion,site")
    done = fedlora("init", "--data", "notes.csv", "--yes")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line == (
        "fedlora: --label = None: may be one of opinion (2 values), site (3 values); name it by --label, "
        "or give --label none"
    )
    assert not Path("fedlora.toml").exists()
    assert written("--data", "notes.csv", "--label", "site").data.label == "site"


@pytest.mark.parametrize(
    ("rows", "values", "few"),
    [
        (10, ("good", "bad"), True),
        (9, ("good", "bad"), False),  # fewer than five rows a value
        (500, tuple(map(str, range(50))), True),
        (500, tuple(map(str, range(51))), False),
        (60, ("good",), False),
    ],
)
def test_few_values_are_2_to_50_with_five_rows_each(rows: int, values: tuple[str, ...], few: bool) -> None:
    table("notes.csv", "id,note,opinion,site", rows, values)
    config = written("--data", "notes.csv", "--owner", "site", "--model", "m")
    assert config.model.task == ("sequence-classification" if few else "causal-lm")


def test_it_says_what_it_chose_and_how_to_choose_otherwise() -> None:
    done = fedlora("init", "--data", "reviews.csv", "--owner", "clinic")
    assert done.out.splitlines()[1:3] == [
        "chosen: task sequence-classification, model asset:minilm-l6, text review, label stars (2 classes: bad, good), "
        "owner clinic (3 owners)",
        "to choose otherwise, edit the file, or remove it and give --model, --text, --label, --owner or --clients",
    ]
    done = fedlora("init", "lm.toml", "--data", "reviews.csv", "--label", "none", "--clients", "1", "--model", "m")
    chosen = done.out.splitlines()[1]
    assert chosen == "chosen: task causal-lm, model m, text review, no label, no owner: rows at random to 1 client"


def test_a_file_cannot_write_to_the_terminal_through_its_labels() -> None:
    table("notes.csv", "id,note,label,site", 60, ("good\x1b[2J", "b" * 30))
    done = fedlora("init", "--data", "notes.csv")
    assert done.code == 0
    assert "(2 classes: " + "b" * 17 + "..., good\\x1b[2J)" in done.out


def test_a_label_without_two_classes_is_refused() -> None:
    for values, told in ((("good",), "has one class, 'good'"), (("",), "is an empty column")):
        table("notes.csv", "id,note,label,site", 60, values)
        done = fedlora("init", "--data", "notes.csv")
        assert done.code == 2
        assert done.err.startswith(f"fedlora: --label = 'label': {told}")
        assert len(done.err.splitlines()) == 1


def test_delta_is_below_one_over_the_rows_of_a_large_file() -> None:
    Path("many.csv").write_text("text,label\n" + "a,1\nb,2\n" * 60_000)
    assert written("--data", "many.csv").privacy.target_delta < 1 / 120_000


def test_each_key_has_its_meaning_above_it() -> None:
    written()
    lines = Path("fedlora.toml").read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) > 15
    assert all(lines[i - 1].startswith("# ") for i in keys)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "missing.csv"], "--data = 'missing.csv': there is no such file"),
        (["--data", "reviews.csv", "--text", "txt"], "--text = 'txt': there is no such column; columns: review"),
        (
            ["--data", "reviews.csv", "--text", "stars", "--label", "stars"],
            "--label = 'stars': is the column of the texts",
        ),
        (["--data", "reviews.csv", "--label", "l"], "--label = 'l': there is no such column"),
        (["--data", "reviews.csv", "--owner", "o"], "--owner = 'o': there is no such column"),
        (["--owner", "a", "--clients", "3"], "--clients = 3: follows from --owner"),
        (["--owner", "stars", "--data", "gaps.csv"], "--owner = 'stars': line 2 of gaps.csv has"),
        (["--data", "gaps.csv", "--text", "stars", "--label", "none"], "--text = 'stars': holds numbers alone"),
        (["--data", "head.csv"], "--data = 'head.csv': holds no rows"),
        (
            ["--data", "asset:rotten-tomato"],
            "--data = 'asset:rotten-tomato': there is no such asset; did you mean",
        ),
        (["--data", "asset:minilm-l6"], "--data = 'asset:minilm-l6': is a model; here belongs one of asset:rotten-to"),
        (
            ["--data", "asset:rotten-tomatoes", "--text", "txt"],
            "--text = 'txt': there is no such column; columns: text",
        ),
        (["--data", "asset:vitaminc", "--text", "txt"], "--text = 'txt': there is no such column; columns: evidence"),
        (["--data", "nodes"], "data.test = None: is required with data.name = nodes"),
        (["--model", "asset:nope"], "--model = 'asset:nope': there is no such asset; known: asset:minilm-l6, asset:"),
        (["--model", "asset:rotten-tomatoes"], "--model = 'asset:rotten-tomatoes': is a data set; here belongs one of"),
        (["--model", "reviews.csv"], "--model = 'reviews.csv': is a file"),
        (["--epsilon", "eight"], "--epsilon = 'eight': give a number from 0 to 1000"),
        (["--epsilon", "nan"], "privacy.target_epsilon = nan"),
        (["--clients", "0"], "--clients = 0: give an integer of at least 1"),
        (["--epsilon", "2000"], "--epsilon = 2000.0: give a number from 0 to 1000"),
        (["reviews.csv"], "FILE = 'reviews.csv': exists already"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(arguments: list[str], told: str) -> None:
    Path("gaps.csv").write_text("review,stars\na,\nb,1\nc,2\n")
    Path("head.csv").write_text("review,stars\n")
    done = fedlora("init", *arguments)
    assert done.code == 2
    assert told in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("fedlora.toml").exists()


ANSWERS = {
    "data": ("reviews.csv", "missing.csv", "asset:rotten-tomato", "asset:minilm-l6", "nodes"),
    "text": ("review", "txt"),
    "label": ("stars", "lable", "review"),
    "model": ("models/own", "asset:nope", "asset:rotten-tomatoes", "reviews.csv"),
    "owner": ("none", "hospital"),
    "clients": ("2", "two", "0"),
    "epsilon": ("3", "much", "-1", "2000", "nan"),
}
"""To each question in turn an answer that will do, and wrong ones."""


def test_a_wrong_answer_is_asked_again_with_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    done = answered(monkeypatch, *(answer for right, *wrong in ANSWERS.values() for answer in (*wrong, right)))
    assert done.code == 0, done.out + done.err
    mistakes = [line.partition("Error: ")[2] for line in done.out.splitlines() if "Error: " in line]
    assert len(mistakes) == sum(len(answers) - 1 for answers in ANSWERS.values())
    for told in (
        "--text = 'txt': there is no such column; columns: review, stars, clinic",
        "--data = 'asset:rotten-tomato': there is no such asset; did you mean asset:rotten-tomatoes?",
        "--model = 'asset:rotten-tomatoes': is a data set; here belongs one of asset:minilm-l6, asset:",
        "--label = 'review': is the column of the texts",
    ):
        assert any(mistake.startswith(told) for mistake in mistakes), told
    config = load_config("fedlora.toml")
    assert (config.data.text, config.data.label, config.model.name) == ("review", "stars", "models/own")
    assert (config.data.partition.clients, config.privacy.target_epsilon) == (2, 3.0)


def test_a_wrong_option_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    done = answered(monkeypatch, *[""] * 9, options=("--data", "reviews.csv", "--text", "txt"))
    assert done.code == 2
    assert "--text = 'txt'" in done.err


def test_an_assets_columns_are_known_before_it_is_fetched() -> None:
    assert written("owned.toml", "--owner", "movie").data.partition.column == "movie"
    config = written("chats.toml", "--data", "asset:social-iqa")
    assert (config.model.task, config.data.messages) == ("causal-lm", "messages")


def test_a_saved_folder_is_read_like_a_file(here: Path) -> None:
    rows = [{"note": f"a note of some length {i}", "opinion": "ab"[i % 2]} for i in range(40)]
    datasets.Dataset.from_list(rows).save_to_disk(here / "saved")
    config = written("--data", "saved")
    assert (config.data.text, config.data.label) == ("note", "opinion")
