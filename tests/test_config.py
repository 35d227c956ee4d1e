"""The typed model of a run: what it accepts, how it is overridden, and what it says about every mistake."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fedlora.config import Config, load_config, unused_keys
from fedlora.errors import InputError
from fedlora.methods import methods
from tests.configs import BASE, KEYS, SECTIONS, VALUES, accepted, override, put, text, wrong_values


def refused(source: Any, overrides: dict[str, Any] | None = None) -> InputError:
    """Return the error of a config, after checking its form."""
    with pytest.raises(InputError) as caught:
        load_config(source, overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"{caught.value.field} = ")
    assert caught.value.remedy
    return caught.value


def test_the_schema_is_the_documented_one() -> None:
    assert {key.partition(".")[0] for key in KEYS} == {
        *("run", "model", "data", "method", "client", "privacy", "server", "wire", "simulation"),
        *("network", "tracking", "evaluation"),
    }
    named = """run.name run.seed run.rounds model.name model.task model.pooling model.dtype model.max_length data.name
        data.test data.validation data.public data.text data.label data.partition.kind data.partition.clients
        data.partition.alpha method.name method.rank method.alpha method.target_modules method.init client.optimizer
        client.learning_rate client.batch_size client.local_steps client.local_epochs privacy.mode
        privacy.target_epsilon privacy.noise_multiplier privacy.target_delta privacy.max_grad_norm privacy.accountant
        server.fraction_train server.min_replies simulation.workers simulation.cpus_per_worker
        simulation.gpus_per_worker simulation.cohort_size simulation.address data.messages data.template data.choices
        data.long_texts data.packing evaluation.kind evaluation.max_new_tokens evaluation.max_examples"""
    assert set(named.split()) <= set(KEYS)


def test_a_clipping_norm_whose_noise_would_be_rounded_to_nothing_is_refused() -> None:
    """At 1e-45, float32's smallest number, noise of multiplier 0.4 is 0 and a clipped gradient is not."""
    assert not torch.empty(1000).normal_(0, 0.4 * 1e-45).any()
    assert refused(BASE, {"privacy.max_grad_norm": 1e-45}).field == "privacy.max_grad_norm"
    smallest = load_config(BASE, {"privacy.max_grad_norm": 1e-6}).privacy.max_grad_norm
    assert torch.empty(1000).normal_(0, 1e-4 * smallest).std() == pytest.approx(1e-4 * smallest, rel=0.1)


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("run.rounds", "ten", "give an integer from 1 to 100000"),
        ("run.rounds", 2.5, "give an integer from 1 to 100000"),
        ("run.seed", 2**70, "give an integer of at least 0 and below 2^63"),
        ("server.fraction_train", "1.5", "give a number above 0 and at most 1"),
        ("privacy.target_epsilon", "eight", "give a number above 0"),
        ("privacy.target_epsilon", "-1", "give a number above 0"),
        ("privacy.target_epsilon", "inf", "give a finite number"),
        ("client.optimizer", "adam", "give 'sgd' or 'adamw'"),
        ("client.gradient_checkpointing", "maybe", "give true or false or 'auto'"),
        ("method.target_modules", "5", "give a text or a list of values, each a text"),
        ("data.packing", "1", "give true or false"),
        ("data.partition.clients", "0", "give an integer of at least 1 and below 2^31"),
    ],
)
def test_the_remedy_is_what_the_key_takes(key: str, value: Any, remedy: str) -> None:
    assert refused(BASE, {key: value}).remedy == remedy


def test_the_remedy_for_an_option_of_a_method_says_its_range() -> None:
    source = {**BASE, "method": {"name": "ravan"}}
    assert refused(source, {"method.heads": "x"}).remedy == "give an integer"
    assert refused(source, {"method.heads": "0"}).remedy == "give a number of at least 1"


# Round trip.

word = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "run.name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True),
    "run.seed": st.integers(0, 2**63 - 1),
    "run.rounds": st.integers(1, 10**5),
    "model.pooling": st.sampled_from(["default", "mean"]),
    "model.max_length": st.integers(2, 4096),
    "model.num_hidden_layers": st.integers(1, 99),
    "data.name": word,
    "data.text": word,
    "data.label": word,
    "data.max_examples": st.integers(1, 10**9),
    "data.partition.kind": st.sampled_from(["iid", "dirichlet", "pathological", "shard", "size"]),
    "data.partition.alpha": st.floats(1e-3, 1e6),
    "method.rank": st.integers(1, 512),
    "method.alpha": st.floats(1e-4, 1e6),
    "method.target_modules": word | st.lists(word, min_size=1),
    "method.dropout": st.floats(0, 1, exclude_max=True),
    "client.learning_rate": st.floats(1e-12, 1e3) | st.integers(1, 9),
    "client.local_steps": st.integers(1, 99),
    "client.gradient_checkpointing": st.booleans() | st.just("auto"),
    "privacy.target_delta": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "server.timeout": st.floats(0, 1e6, exclude_min=True),
    "simulation.cohort_size": st.integers(1, 99) | st.just("auto"),
    "simulation.gpus_per_worker": st.floats(0, 1) | st.integers(0, 8),
    "simulation.address": word,
    "tracking.tensorboard": st.booleans(),
}


@given(st.fixed_dictionaries({}, optional=VALID))
def test_a_resolved_config_runs_again_as_it_is(values: dict[str, Any]) -> None:
    content = copy.deepcopy(BASE)
    for key, value in values.items():
        put(content, key, value)
    config = load_config(content)
    for key, value in values.items():
        assert get(config, key) == value
    written = config.to_toml()
    assert load_config(written) == config
    assert load_config(written).to_toml() == written


OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "fed-sb": {"init": st.sampled_from(["svd", "pooled"]), "init_examples": st.integers(1, 99)},
    "flexmore": {
        "ranks": st.lists(st.integers(1, 99) | st.just("full"), min_size=4, max_size=4)
        | st.dictionaries(word, st.integers(1, 99) | st.just("full"), min_size=1),
        "extraction": st.sampled_from(["direct", "svd"]),
        "norm_topk_prob": st.booleans(),
    },
}


@pytest.mark.parametrize("method", sorted(OPTIONS))
@given(data=st.data())
def test_a_methods_own_keys_stay_in_the_resolved_config(method: str, data: st.DataObject) -> None:
    values = data.draw(st.fixed_dictionaries({}, optional=OPTIONS[method]))
    content = {**BASE, "model": {"name": "m", "task": "causal-lm"}, "method": {"name": method, **values}}
    config = load_config(content)
    assert {key: getattr(config.method, key) for key in values} == values
    assert type(config.method) is methods()[method].Options
    again = [Config.from_toml(config.to_toml()), load_config(config.to_toml())]
    again += [Config.model_validate_json(config.model_dump_json()), Config.model_validate(config.model_dump())]
    for read in again:
        assert read == config
        assert type(read.method) is type(config.method)
        assert read.to_toml() == config.to_toml()


def get(config: Config, key: str) -> Any:
    """Read ``section.key``."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_a_config_is_read_from_a_file_from_text_and_from_a_mapping(tmp_path: Path) -> None:
    config = load_config(BASE)
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == load_config(str(path)) == load_config(config.to_toml()) == config


def test_what_was_given_is_not_changed() -> None:
    content = override("run.seed", 3)
    before = repr(content)
    load_config(content, {"run.seed": "4", "data.partition.clients": "7", "method.alpha": ""})
    assert repr(content) == before


def test_none_in_a_mapping_is_as_good_as_absent() -> None:
    assert load_config(override("method.alpha", None)) == load_config(BASE)


# Overrides.


@pytest.mark.parametrize(
    ("key", "given_text", "expected"),
    [
        ("run.seed", "7", 7),
        ("client.learning_rate", "1e-3", 1e-3),
        ("client.learning_rate", "1", 1.0),
        ("run.name", "bare-string", "bare-string"),
        ("run.name", '"quoted"', "quoted"),
        ("model.name", "asset:minilm-l6", "asset:minilm-l6"),
        ("data.name", "/tmp/a b.csv", "/tmp/a b.csv"),
        ("data.text", "a = b", "a = b"),
        ("method.target_modules", '["query", "value"]', ["query", "value"]),
        ("method.target_modules", "all-linear", "all-linear"),
        ("tracking.tensorboard", "true", True),
        ("simulation.cohort_size", "auto", "auto"),
        ("simulation.cohort_size", "4", 4),
        ("client.gradient_checkpointing", "auto", "auto"),
        ("client.gradient_checkpointing", "true", True),
    ],
)
def test_an_override_is_a_toml_value_else_a_bare_string(key: str, given_text: str, expected: Any) -> None:
    assert get(load_config(BASE, {key: given_text}), key) == expected


def test_an_override_that_is_no_string_is_taken_as_it_is() -> None:
    config = load_config(BASE, {"run.seed": 5, "method.target_modules": ["query"]})
    assert (config.run.seed, config.method.target_modules) == (5, ["query"])


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_override_removes_the_key(empty: str | None) -> None:
    content = override("run.seed", 9)
    assert load_config(content).run.seed == 9
    assert load_config(content, {"run.seed": empty}).run.seed == 0
    assert load_config(content, {"method.alpha": empty}) == load_config(content)  # it was not there
    assert refused(content, {"model.name": empty}).field == "model.name"


@pytest.mark.parametrize("key", ["seed", "run.", ".seed", "run..seed", "", "model.name.x", "data.name.x.y"])
def test_an_override_without_section_and_key_is_refused(key: str) -> None:
    error = refused(BASE, {key: "1"})
    assert error.field == "--set"
    assert f"{key}=1" in str(error)


@given(text)
@example("9" * 5000)
@example("[" * 5000)
@example("1\nrun.seed = 2")
@example("1 # comment")
def test_any_text_as_an_override_is_a_value_or_one_line(value: str) -> None:
    content = override("data.text", "before")
    taken = fails = None
    try:
        taken = load_config(content, {"data.text": value}).data.text
    except InputError as error:
        fails = error
    if fails is None:
        assert isinstance(taken, str)
    else:
        assert fails.field == "data.text"
        assert len(str(fails).splitlines()) == 1


# Mistakes.


def test_there_are_far_more_than_twenty_kinds_of_wrong_values() -> None:
    kinds = {(key, kind) for key, a in KEYS.items() for kind in VALUES if kind not in accepted(a)[0]}
    assert len(kinds) > 200


@given(wrong_values())
@settings(max_examples=300)
def test_a_wrong_value_is_one_line_that_names_the_key(wrong: tuple[str, Any]) -> None:
    key, value = wrong
    assert refused(override(key, value)).field == key


@pytest.mark.parametrize("key", sorted(key for key in KEYS if dict not in accepted(KEYS[key])[0]))
def test_every_key_refuses_a_table(key: str) -> None:
    assert refused(override(key, {"a": 1})).field == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.rounds", 0),
        ("run.seed", -1),
        ("run.seed", 2**63),
        ("run.name", "../elsewhere"),
        ("run.name", ""),
        ("run.name", "a\n"),
        ("model.max_length", 1),
        ("model.name", ""),
        ("method.rank", 0),
        ("method.rank", True),
        ("method.dropout", 1.0),
        ("method.alpha", 0.0),
        ("client.learning_rate", float("nan")),
        ("client.learning_rate", float("inf")),
        ("client.batch_size", 1.0),
        ("privacy.target_delta", 1.0),
        ("privacy.target_epsilon", 0.0),
        ("privacy.noise_multiplier", -0.1),
        ("server.fraction_train", 0.0),
        ("server.fraction_train", 1.5),
        ("server.timeout", 0.0),
        ("simulation.cohort_size", 0),
        ("simulation.cohort_size", "all"),
        ("client.gradient_checkpointing", "on"),
        ("simulation.gpus_per_worker", -1.0),
        ("simulation.gpus_per_worker", 1.5),
        ("data.partition.alpha", 0.0),
        ("data.partition.clients", 0),
        ("data.partition.kind", "dirichlett"),
        ("method.target_modules", [1]),
        ("method.ranks", [0]),
        ("method.ranks", ["half"]),
        ("method.ranks", {"comp": -1}),
        ("method.device_profile", {"4": 1.5}),
        ("method.extraction", "qr"),
        ("method.num_experts_per_tok", 0),
        ("method.router_tuning_steps", -1),
    ],
)
def test_a_value_out_of_range_is_named(key: str, value: Any) -> None:
    error = refused(override(key, value))
    assert error.field == key
    assert repr(value) in str(error) or isinstance(value, list | dict)


def test_both_forms_of_a_key_are_told() -> None:
    remedy = refused(override("simulation.cohort_size", "all")).remedy
    assert "integer" in remedy
    assert "auto" in remedy


@given(st.sampled_from(["", *SECTIONS]), text)
@example("run", "a\nb")
@example("run", "")
@example("data.partition", "\x1b[31m")
@settings(max_examples=100)
def test_an_unknown_key_is_one_line_that_names_it(section: str, key: str) -> None:
    content = copy.deepcopy(BASE)
    place: dict[str, Any] = content
    model: Any = Config
    for part in section.split(".") if section else ():
        place, model = place.setdefault(part, {}), model.model_fields[part].annotation
    assume(key not in model.model_fields and ".".join([section, key]) not in KEYS)
    place[key] = 1
    error = refused(content)
    assert error.field.startswith(section)
    assert "there is no such key" in error.remedy
    if key.isprintable() and "." not in key:
        assert error.field.rpartition(".")[2] == (key or "''")


@pytest.mark.parametrize("key", sorted(KEYS))
@pytest.mark.parametrize("typo", [lambda k: k + k[-1], lambda k: k.replace("_", "-") + "s"])
def test_a_mistyped_key_is_answered_with_the_right_one(key: str, typo: Any) -> None:
    section, _, name = key.rpartition(".")
    if f"{section}.{typo(name)}" in KEYS:
        pytest.skip("a key of its own")  # method.rank and method.ranks
    error = refused(override(f"{section}.{typo(name)}", 1))
    assert error.field == f"{section}.{typo(name)}"
    assert error.remedy.endswith(f"did you mean {name}?")


def test_a_mistyped_section_is_answered_with_the_right_one() -> None:
    assert "did you mean client?" in refused({**BASE, "clients": {"batch_size": 1}}).remedy
    assert "did you mean partition?" in refused(override("data.partitions.clients", 3)).remedy


def test_a_section_that_is_a_value_is_told_so() -> None:
    error = refused({**BASE, "client": 3})
    assert (error.field, error.value) == ("client", 3)
    assert "[client]" in error.remedy


@pytest.mark.parametrize("key", ["model.name", "data.name", "method.name"])
def test_a_required_key_is_asked_for(key: str) -> None:
    content = override(key, None)
    assert refused(content).field == key
    section = key.partition(".")[0]
    assert refused({k: v for k, v in content.items() if k != section}).field == section


EXPERTS: dict[str, Any] = {"method.name": "flexmore", "model.task": "causal-lm"}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"privacy.mode": "person", "privacy.target_epsilon": 1.0}, "privacy.mode"),
        ({"privacy.mode": "example"}, "privacy.target_epsilon"),
        (
            {"privacy.mode": "example", "privacy.target_epsilon": 1.0, "privacy.noise_multiplier": 1.0},
            "privacy.target_epsilon",
        ),
        ({"client.local_steps": 2, "client.local_epochs": 2}, "client.local_steps"),
        ({"data.partition.kind": "natural"}, "data.partition.column"),
        ({"data.partition.clients": ""}, "data.partition.clients"),
        ({"data.prompt": "question"}, "data.prompt"),
        ({"data.answer": "answer"}, "data.prompt"),
        ({"model.task": "causal-lm", "data.partition.kind": "dirichlet"}, "data.partition.column"),
        ({"method.name": "fed-sb", "method.init": "public"}, "method.init"),
        (
            {
                "method.name": "fed-sb",
                "method.init": "pooled",
                "privacy.mode": "example",
                "privacy.target_epsilon": 1.0,
            },
            "method.init",
        ),
        ({"server.min_replies": 5}, "server.min_replies"),
        ({"server.min_replies": 3, "server.fraction_train": 0.5}, "server.min_replies"),
        ({"method.name": "flexmore"}, "model.task"),
        (EXPERTS | {"method.ranks": [4, 8]}, "method.ranks"),
        (EXPERTS | {"method.ranks": []}, "method.ranks"),
        (EXPERTS | {"method.ranks": [1, 2, 3, 4], "method.device_profile": {"4": 1.0}}, "method.ranks"),
        (EXPERTS | {"method.device_profile": {"4": 0.5}}, "method.device_profile"),
        (EXPERTS | {"method.device_profile": {"0": 0.5, "4": 0.5}}, "method.device_profile"),
        (EXPERTS | {"method.device_profile": {"large": 1.0}}, "method.device_profile"),
        (EXPERTS | {"method.router_init": "public"}, "method.router_init"),
        (EXPERTS | {"method.router_tuning_steps": 5}, "method.router_tuning_steps"),
    ],
)
def test_an_impossible_combination_is_named(values: dict[str, Any], field: str) -> None:
    assert refused(BASE, values).field == field


@pytest.mark.parametrize(
    "values",
    [
        {"privacy.mode": "example", "privacy.target_epsilon": 1.0},
        {"privacy.mode": "example", "privacy.noise_multiplier": 0.0},
        # Keys that the mode does not use are noted, not refused.
        {"privacy.target_epsilon": 1.0, "privacy.noise_multiplier": 1.0},
        {"data.partition.kind": "natural", "data.partition.column": "movie", "data.partition.clients": ""},
        {"data.prompt": "question", "data.answer": "answer"},
        {"model.task": "causal-lm", "data.partition.kind": "dirichlet", "data.partition.column": "topic"},
        {"method.init": "public"},  # of fed-sb, so unused here
        {"method.name": "fed-sb", "method.init": "public", "data.public": "test"},
        {"method.name": "fed-sb", "method.init": "pooled"},
        {
            "method.name": "fed-sb",
            "method.init": "pooled",
            "method.init_not_covered": True,
            "privacy.mode": "example",
            "privacy.target_epsilon": 1.0,
        },
        {"server.min_replies": 4},
        EXPERTS | {"method.ranks": [4, "full", 1, 600]},
        EXPERTS | {"method.ranks": {"comp": 4, "0": "full"}},
        EXPERTS | {"method.device_profile": {"4": 0.75, "full": 0.25}},
        EXPERTS | {"method.router_init": "public", "method.router_tuning_steps": 5, "data.public": "test"},
        {"method.ranks": [1]},  # of flexmore, so unused here
    ],
)
def test_a_possible_combination_is_accepted(values: dict[str, Any]) -> None:
    load_config(BASE, values)


def test_both_budgets_are_shown() -> None:
    values = {"privacy.mode": "example", "privacy.target_epsilon": 3.5, "privacy.noise_multiplier": 0.25}
    line = str(refused(BASE, values))
    assert "3.5" in line
    assert "noise_multiplier = 0.25" in line


@pytest.mark.parametrize("bad", ["[run]\nname = '", "run.seed = 1\nrun.seed = 2\n", "a\nb\n", "x = \x00\n"])
def test_text_that_is_no_toml_is_refused(bad: str) -> None:
    assert refused(bad).field == "CONFIG"


@pytest.mark.parametrize("path", ["no-such.toml", "/", "x" * 5000, "\0", "~nobody-of-that-name/x.toml"])
def test_a_path_that_is_no_file_is_refused(path: str) -> None:
    assert refused(path).field == "CONFIG"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert refused(path).field == "CONFIG"


# Notes and derived values.


def test_keys_without_use_are_noted_and_only_those() -> None:
    assert unused_keys(load_config(BASE)) == []
    config = load_config(
        BASE,
        {
            "privacy.target_epsilon": 8.0,
            "method.init": "public",
            "client.momentum": 0.9,
            "data.partition.alpha": 0.1,
            "client.batch_size": 4,
        },
    )
    noted = {note.split()[0] for note in unused_keys(config)}
    assert {"privacy.target_epsilon", "method.init", "client.momentum", "data.partition.alpha"} <= noted
    assert "client.batch_size" not in noted
    natural = {"data.partition.kind": "natural", "data.partition.column": "site", "data.partition.clients": 5}
    assert "data.partition.clients" in {note.split()[0] for note in unused_keys(load_config(BASE, natural))}
    used = load_config(
        BASE,
        {
            "privacy.mode": "example",
            "privacy.target_epsilon": 8.0,
            "client.optimizer": "sgd",
            "client.momentum": 0.9,
            "data.partition.kind": "dirichlet",
            "data.partition.alpha": 0.1,
        },
    )
    assert unused_keys(used) == []
    # An expert's keys are of use to flexmore alone, and one rank for all only where clients have none of their own.
    experts = {"method.ranks": [1, 2, 3, 4], "method.router_documents": 5, "method.rank": 4, "data.public": "test"}
    noted = {note.split()[0] for note in unused_keys(load_config(BASE, experts))}
    assert noted == {"method.ranks", "method.router_documents"}
    assert [note.split()[0] for note in unused_keys(load_config(BASE, EXPERTS | experts))] == ["method.rank"]
    public = EXPERTS | {"method.router_init": "public", "method.router_documents": 5, "data.public": "test"}
    assert [note.split()[0] for note in unused_keys(load_config(BASE, public))] == ["method.router_documents"]


def test_values_without_an_effect_are_noted() -> None:
    without = {"client.weight_decay": 1e-300, "server.evaluate_every": 9, "run.rounds": 8}
    assert {note.split()[0] for note in unused_keys(load_config(BASE, without))} == {
        "client.weight_decay",
        "server.evaluate_every",
    }
    with_one = {"client.weight_decay": 1e-4, "server.evaluate_every": 8, "run.rounds": 8}
    assert unused_keys(load_config(BASE, with_one)) == []


def test_scaling_is_alpha_over_rank_and_one_by_default() -> None:
    assert load_config(BASE).scaling() == 1.0
    assert load_config(BASE, {"method.rank": 4, "method.alpha": 2.0}).scaling() == 0.5


@given(text, st.one_of(VALUES.values()), text)
def test_an_error_is_one_line_and_survives_pickling(field: str, value: Any, remedy: str) -> None:
    error = InputError("section.key", value, remedy)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.field, again.remedy) == (error.field, error.remedy)
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 300 + len(remedy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("client.learning_rate", 1e30),
        ("client.batch_size", 10**12),
        ("client.local_steps", 10**9),
        ("run.rounds", 10**12),
        ("model.max_length", 10**9),
        ("data.partition.alpha", 1e-300),
        ("method.alpha", 1e30),
        ("method.target_modules", []),
        ("server.timeout", 1e300),
        ("simulation.workers", 10**6),
        ("simulation.cohort_size", 10**12),
        ("data.text", "a\nb"),
        ("data.name", "x" * 100_000),
        ("model.revision", ""),
    ],
)
def test_values_that_nobody_means_are_refused(key: str, value: Any) -> None:
    assert refused(override(key, value)).field == key


def test_a_byte_order_mark_before_toml_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(load_config(BASE).to_toml(), encoding="utf-8-sig")
    assert load_config(path) == load_config(path.read_text(encoding="utf-8")) == load_config(BASE)
