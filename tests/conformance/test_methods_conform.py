"""What every method must do, whoever adds it: a new method's own file passes this without an edit elsewhere.

A method that cannot do something says so in its class, and is asked through that. Its runs here are tiny.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedlora
from fedlora.clients.resources import client_data
from fedlora.config import Config, MethodSection, load_config, unused_keys
from fedlora.errors import InputError
from fedlora.figures.style import COLOURS, MARKERS
from fedlora.methods import Method, methods
from fedlora.privacy.calibration import spent_epsilon
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.roles import HEAD, trained_kinds
from fedlora.strategies.base import FederatedStrategy, get_strategy
from fedlora.study.forecast import forecast
from tests import tiny
from tests.configs import accepted, keys
from tests.small_runs import CLIENTS, KINDS, ROUNDS, Watched, World, world

METHODS = methods()
PRIVATE = [name for name, method in METHODS.items() if method.dp]

HALF = {"server": {"fraction_train": 0.5}}
"""Two of the four clients a round: some miss rounds."""
WIDE = {"model": {"dtype": "float64"}}
"""What is exact is so to rounding, which is small here."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with world(tmp_path_factory.mktemp("methods")) as made:
        yield made
    torch.set_num_threads(threads)


def content(here: World, name: str, kind: str | None = None, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a config of a method on a model, by default the first that it does not refuse."""
    return here.content(name, kind or here.kinds(name)[0], **sections)


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def half(here: World, name: str, kind: str) -> Watched | None:
    """A run in which clients miss rounds, on a model of one kind; None where the method refuses that task."""
    return here.run(content(here, name, kind, **HALF)) if kind in here.kinds(name) else None


# What a method says of itself.


def test_it_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", method.name)
    assert method.name == name
    assert method.title
    assert method.paper
    assert method.__doc__
    assert {"adamw", "sgd"} <= method.learning_rates.keys()
    assert all(0 < rate < 1000 for rate in method.learning_rates.values())
    assert method.color in COLOURS or re.fullmatch("#[0-9a-fA-F]{6}|", method.color)
    assert method.marker in {*MARKERS, ""}
    assert issubclass(method, FederatedStrategy)
    for key, option in method.Options.model_fields.items():
        assert option.description, f"method.{key} has no description"


def test_it_looks_like_no_other(name: str) -> None:
    looks = [(method.color, method.marker) for method in METHODS.values() if method.color]
    assert looks.count((METHODS[name].color, METHODS[name].marker)) <= 1


def test_it_takes_some_task(here: World, name: str) -> None:
    assert here.kinds(name)


def test_its_table_names_what_its_model_has(here: World, name: str) -> None:
    """A kind that is misspelt in the table would be frozen without a word; clients must train something each round."""
    config = load_config(content(here, name))
    strategy = get_strategy(name)(config)
    data = client_data(config)
    adapted = strategy.adapt(_base(config, data.label_names), config)
    strategy.know(adapted)
    there = {strategy.kind(full) for full in (*adapted.stacked_layers(), *adapted.head_names)}
    for server_round in range(1, 5):
        roles = strategy.roles(config, server_round)
        assert trained_kinds(roles)
        assert adapted.names(trained_kinds(roles))
        # A language model has no head, an expert of another sort no factors.
        made = {kind for kind, role in roles.items() if not role.increment and kind != HEAD}
        assert made & there
        assert there <= {*roles, HEAD}


def _base(config: Config, label_names: list[str] | None) -> torch.nn.Module:
    from fedlora.models import load_base

    return load_base(config, label_names, "meta")


# Bytes.


def test_some_client_misses_a_round_and_comes_back(half: Watched | None) -> None:
    if half is None:
        return
    rounds = {client: [r for r, clients in enumerate(half.sampled, 1) if client in clients] for client in range(4)}
    assert any(r and r[-1] - r[0] >= len(r) for r in rounds.values()), rounds
    assert any(r and r[0] > 1 for r in rounds.values()), rounds


def test_formula_is_what_is_measured(half: Watched | None) -> None:
    if half is None:
        return
    rows = half.rows("communication.csv")
    assert {row["round"] for row in rows} == set(range(1, ROUNDS + 1))
    assert {row["direction"] for row in rows} <= {"initial", "down", "up"}
    for row in rows:
        assert row["payload_bytes"] == row["formula_bytes"], row
        # Names, headers, metrics and the round's settings, and little else.
        assert 0 < row["message_bytes"] - row["payload_bytes"] < 20_000, row
    assert all(row["payload_bytes"] > 0 for row in rows if row["direction"] != "down")


def test_forecast_is_what_is_run(half: Watched | None) -> None:
    if half is None:
        return
    check_forecast(half)
    expected, summary = forecast(half.config), half.summary
    assert expected.payload_bytes == summary["communication"]["payload_bytes"]
    assert expected.trainable_parameters == summary["trainable_parameters"]
    assert expected.clients == summary["clients"] == len(CLIENTS)
    assert expected.steps == sum(map(len, half.sampled)) * half.config.client.local_steps


def check_forecast(run: Watched) -> None:
    expected, sums = forecast(run.config), defaultdict(int)
    for row in run.rows("communication.csv"):
        sums[row["direction"]] += row["payload_bytes"]
    found = (expected.initial_bytes, expected.downlink_bytes, expected.uplink_bytes)
    assert found == (sums["initial"], sums["down"], sums["up"])


def test_formula_and_forecast_hold_for_a_codec(here: World, name: str) -> None:
    """Of one byte a number, and some for each array; what is sent once, or where it is stale, is never rounded."""
    run = here.run(content(here, name, wire={"codec": "int8"}, **HALF))
    for row in run.rows("communication.csv"):
        assert row["payload_bytes"] == row["formula_bytes"], row
    check_forecast(run)


def sending_updates(here: World, name: str, /, **sections: Any) -> dict[str, Any] | None:
    """Return a config with a codec of updates; None where the server does not hold what clients start from.

    Where the method's coordinates change, it is without error feedback.
    """
    given = content(here, name, **HALF, **sections)
    try:
        load_config(given)
    except InputError as error:
        if "a start that the server does not hold" in error.remedy:
            return None
        assert not METHODS[name].persistent
        given["wire"]["error_feedback"] = False
    return given


def test_updates_that_are_sent_whole_give_the_methods_own_result(here: World, name: str) -> None:
    """Whatever its table says goes up: the server adds what it sent before the method sees a reply."""
    given = sending_updates(here, name, wire={"uplink_codec": "topk", "topk_fraction": 1.0})
    if given is not None:
        close(here.run(given), here.run(content(here, name, **HALF)), 1e-5)


def test_errors_are_fed_back_across_a_stop_and_a_round_that_does_not_count(here: World, name: str) -> None:
    """To the same bits; and bytes are the formula's."""
    given = sending_updates(here, name, wire={"uplink_codec": "onebit"})
    if given is None:
        return
    whole = here.run(given, uncounted=(2,))
    for row in whole.rows("communication.csv"):
        assert row["payload_bytes"] == row["formula_bytes"], row
    same(here.run(given, uncounted=(2,), stops=(1, 2)), whole)


def test_a_cohort_feeds_back_what_its_clients_alone_do(here: World, name: str) -> None:
    given = sending_updates(here, name, wire={"uplink_codec": "onebit"}, **WIDE)
    if given is not None:
        alone, together = here.run(given), here.run(given | {"simulation": {"workers": 0, "cohort_size": 2}})
        close(together, alone, 1e-6)  # what travels is in float32


# Rounds.


def test_a_resumed_run_is_an_uninterrupted_one(here: World, name: str) -> None:
    """Clients miss rounds, and one round does not count.

    Clients go on from the server's arrays and not from what they trained then, and formulas know of it.
    """
    given = content(here, name, **HALF)
    whole = here.run(given, uncounted=(2,))
    assert [line["counted"] for line in whole.lines()] == [True, False, True]
    for row in whole.rows("communication.csv"):
        assert row["payload_bytes"] == row["formula_bytes"], row
    same(here.run(given, uncounted=(2,), stops=(1, 2)), whole)


def test_the_first_round_may_not_count(here: World, name: str) -> None:
    run = here.run(content(here, name, **HALF), uncounted=(1,))
    assert [line["counted"] for line in run.lines()] == [False, True, True]
    assert not any(line["failed"] for line in run.lines())
    for row in run.rows("communication.csv"):
        assert row["payload_bytes"] == row["formula_bytes"], row


def same(one: Watched, other: Watched) -> None:
    """Compare two runs, to the bit."""
    assert one.lines() == other.lines()
    assert one.rows("communication.csv") == other.rows("communication.csv")
    assert one.arrays().keys() == other.arrays().keys()
    assert all(torch.equal(array, other.arrays()[name]) for name, array in one.arrays().items())


def _kind(run: Watched) -> str:
    return Path(run.config.model.name).name


def test_the_server_has_the_mean_of_its_clients(here: World, name: str) -> None:
    """To rounding where the method says that it is exact; else the error is there in every round."""
    run = here.run(content(here, name, **WIDE))
    if METHODS[name].personalised(run.config):
        assert not METHODS[name].exact, "its clients' models have no mean that the server could have"
        return
    assert len(run.errors) == ROUNDS
    if METHODS[name].exact:
        assert max(run.errors) <= 1e-12
    else:
        assert min(run.errors) > 1e-10  # an exact method's are a hundredth of it at most


@pytest.mark.parametrize("privacy", [False, True])
def test_a_cohort_is_its_clients_alone(here: World, name: str, privacy: bool) -> None:
    if privacy and not METHODS[name].dp:
        return
    mode = {"privacy": noisy()} if privacy else {}
    given = content(here, name, **WIDE, **mode)
    alone, together = here.run(given), here.run(given | {"simulation": {"workers": 0, "cohort_size": 3}})
    assert alone.rows("communication.csv") == together.rows("communication.csv")
    # Llama's norm computes in float32, in which a difference of the last bit of 64 may be one of 32.
    close(together, alone, 1e-9 if _kind(alone) == "bert" else 1e-5)


def close(one: Watched, other: Watched, tolerance: float) -> None:
    """Compare the results of two runs: of an adapter the product of its factors, of everything else each array.

    Where a singular value is near zero, rounding alone decides which factors an SVD gives.
    """
    first, second = products(one.arrays()), products(other.arrays())
    largest = max(float(array.abs().max()) for array in second.values())
    assert tiny.difference(first, second) <= tolerance * max(1.0, largest)
    assert torch.isfinite(torch.cat([array.flatten() for array in first.values()])).all()


def products(arrays: tiny.Arrays) -> tiny.Arrays:
    """Multiply the two factors of each adapted layer out; keep what is no such factor."""
    first, second = ".lora_A.weight", ".lora_B.weight"
    pairs = {name.removesuffix(first) for name in arrays if name.endswith(first)}
    others = {name: a for name, a in arrays.items() if not name.endswith((first, second))}
    return others | {name: arrays[name + second].double() @ arrays[name + first].double() for name in pairs}


# Privacy.


def noisy(sigma: float = 1.0, clip: float = 0.5) -> dict[str, Any]:
    return {"mode": "example", "noise_multiplier": sigma, "max_grad_norm": clip, "target_delta": 1e-2}


@pytest.mark.parametrize("name", PRIVATE)
def test_every_trained_array_has_a_gradient_of_each_example(here: World, name: str) -> None:
    run = here.run(content(here, name, **WIDE, privacy=noisy()))
    assert len(run.per_example) == ROUNDS * len(CLIENTS)
    for place, found in enumerate(run.per_example):
        trained = set(trained_kinds(METHODS[name].roles(run.config, place // len(CLIENTS) + 1)))
        # A language model has no head, and a table may name the kinds of several sorts of adapters.
        assert found
        assert found <= trained


@pytest.mark.parametrize("name", PRIVATE)
def test_epsilon_is_that_of_the_steps(here: World, name: str) -> None:
    run = here.run(content(here, name, **WIDE, privacy=noisy()))
    steps: dict[int, int] = defaultdict(int)
    rows = run.rows("privacy.csv")
    assert len(rows) == ROUNDS * len(CLIENTS)
    epsilon: dict[int, float] = {}
    for row in rows:
        client = row["client"]
        plan = mechanism_of(run.config).plan(run.config, list(CLIENTS.values())[client])
        assert plan is not None
        steps[client] += row["steps"]
        history = (*plan.start, (row["noise_multiplier"], row["sample_rate"], steps[client]))
        expected = spent_epsilon("rdp", 1e-2, history)
        assert row["epsilon"] == pytest.approx(expected, rel=1e-9)
        assert row["epsilon"] > epsilon.get(client, 0.0)
        epsilon[client] = row["epsilon"]
    assert run.summary["epsilon"]["max"] == max(epsilon.values())


@pytest.mark.parametrize("name", PRIVATE)
def test_without_noise_and_clipping_private_training_is_plain_training(here: World, name: str) -> None:
    """With whole batches: every example is sampled at a rate of 1."""
    open_run = next(given for given in variants(here, name) if METHODS[name].start_examples(load_config(given)) == 0)
    given = content(here, name, **WIDE, method=open_run["method"], client={"batch_size": 16, "local_steps": 2})
    given["client"] |= {"optimizer": "sgd"}
    private = here.run(given | {"privacy": noisy(0.0, 1e6)})
    close(private, here.run(given), 1e-9 if _kind(private) == "bert" else 1e-5)


def test_what_cannot_be_private_is_refused(here: World) -> None:
    for name in METHODS.keys() - set(PRIVATE):
        with pytest.raises(InputError, match="privacy"):
            load_config(content(here, name, privacy=noisy()))


# The result.


def test_what_others_load_computes_the_same(half: Watched | None) -> None:
    if half is None:
        return
    tolerance = 3e-5
    if METHODS[half.config.method.name].personalised(half.config):
        check_own_models(half, tolerance)
        return
    model, _ = fedlora.load(half.folder)
    mask = half.batch["attention_mask"]
    real = mask.bool() if half.logits.dim() == 3 else torch.ones(len(mask), dtype=torch.bool)
    tiny.assert_close(_logits(model, half)[real], half.logits[real], tolerance)
    adapter = half.folder / "adapter"
    if not (adapter / "adapter_config.json").exists():
        return
    before, adapted = _by_peft(half, adapter)
    assert (before - half.logits)[real].abs().max() > 1e-4, "nothing was learned that a test could tell"
    tiny.assert_close(_logits(adapted, half)[real], half.logits[real], tolerance)
    tiny.assert_close(_logits(adapted.merge_and_unload(), half)[real], half.logits[real], tolerance)


def check_own_models(run: Watched, tolerance: float) -> None:
    """Clients that trained left a model each, and no two are alike; what is shared loads too."""
    with pytest.raises(InputError, match="each of the run's clients has a model of its own"):
        fedlora.load(run.folder)
    adapter, found = run.folder / "adapter", []
    _by_peft(run, adapter)
    for client in sorted({client for clients in run.sampled for client in clients}):
        model, _ = fedlora.load(run.folder, client)
        before, adapted = _by_peft(run, adapter / "clients" / str(client))
        got = _logits(model, run)
        assert (before - got).abs().max() > 1e-4, "nothing was learned that a test could tell"
        tiny.assert_close(_logits(adapted, run), got, tolerance)
        assert not any(torch.allclose(got, other, rtol=0, atol=1e-6) for other in found)
        found.append(got)


def _by_peft(run: Watched, adapter: Path) -> tuple[torch.Tensor, Any]:
    """Load an adapter by stock PEFT on the stock model, whose logits come first; nothing may be missing or be left."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    if run.logits.dim() == 3:
        stock: Any = AutoModelForCausalLM.from_pretrained(base)
    else:
        stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=run.logits.shape[-1])
    before = _logits(stock, run)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return before, PeftModel.from_pretrained(stock, str(adapter)).eval()


def _logits(model: Any, run: Watched) -> torch.Tensor:
    with torch.no_grad():
        batch = {name: run.batch[name] for name in ("input_ids", "attention_mask")}
        found: torch.Tensor = model.eval()(**batch).logits
    return found


# Options.

COMMON: dict[str, list[Any]] = {
    "rank": [3],
    "alpha": [5.0],
    "target_modules": [".*(query|q_proj)"],
    "exclude_modules": [".*(query|q_proj)"],
    "dropout": [0.4],
}
"""Other values for the keys that all methods share."""

OPTIONS = [(name, key) for name, method in METHODS.items() for key in method.Options.model_fields if key != "name"]


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_an_option_changes_something_or_is_said_to_have_no_use(here: World, name: str, key: str) -> None:
    """Some other value changes the result, its scores or what travels, in some setting of the method's other keys.

    Or it allows what is refused without it, or has its use under privacy. A key that all methods share may have no use,
    and be noted.
    """
    noted = False
    for given in variants(here, name, besides=key):
        for changed in others(given, METHODS[name], key):
            config = load_config(changed)
            # What the server read is what clients read.
            assert Config.from_toml(config.to_toml()).method == config.method
            if any(note.startswith(f"method.{key} ") for note in unused_keys(config)):
                noted = True
            elif here.run(_short(changed)).seen() != here.run(_short(given)).seen():
                return
    if key in MethodSection.model_fields:
        assert noted, f"method.{key} changed nothing: read it, or yield it in unused()"
    else:
        used = allows_more(here, name, key) or changes_private_runs(here, name, key)
        assert used, f"method.{key} changed nothing: read it, or give its Field examples"


def allows_more(here: World, name: str, key: str) -> bool:
    """Say whether a private run that is refused is allowed with another value."""
    method = METHODS[name]
    for given in variants(here, name, besides=key):
        private = given | {"privacy": noisy()}
        if not _accepted(private) and any(True for _ in others(private, method, key)):
            return True
    return False


def changes_private_runs(here: World, name: str, key: str) -> bool:
    """Say whether another value changes a run that has a target epsilon, where it is not noted that it has no use."""
    privacy = {"privacy": {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3}}
    for given in filter(_accepted, (given | privacy for given in variants(here, name, besides=key))):
        for changed in filter(_accepted, others(given, METHODS[name], key)):
            noted = any(note.startswith(f"method.{key} ") for note in unused_keys(load_config(changed)))
            if not noted and here.run(_short(changed)).seen() != here.run(_short(given)).seen():
                return True
    return False


def _accepted(given: dict[str, Any]) -> bool:
    try:
        load_config(given)
    except InputError:
        return False
    return True


def _short(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"run": {**given["run"], "rounds": 1}, "client": {**given["client"], "local_steps": 3}}


def variants(here: World, name: str, besides: str = "") -> Iterator[dict[str, Any]]:
    """Yield configs of a method: as they come, and with one of its own keys changed."""
    given = content(here, name)
    yield given
    own = [key for key in METHODS[name].Options.model_fields if key not in MethodSection.model_fields]
    for key in own:
        if key != besides:
            yield from others(given, METHODS[name], key)


def others(given: dict[str, Any], method: type[Method], key: str) -> Iterator[dict[str, Any]]:
    """Yield a config with other values of a key: its own ``examples``, or what its type suggests."""
    option = method.Options.model_fields[key]
    values = COMMON.get(key) if key in MethodSection.model_fields else option.examples
    if values is None:
        kinds, words = accepted(dict(keys(method.Options))[key])
        ranks = [[1] * len(CLIENTS), {"1": 1.0}, [2] * len(CLIENTS), {"2": 1.0}]  # 2 is the rank of one head
        values = [*sorted(words), True, False, 1, 2, 0, 0.5, 0.25, *ranks]
        values = [v for v in values if isinstance(v, str) or type(v) in kinds]
    before = given["method"].get(key, option.default)
    for value in values:
        changed = given | {"method": {**given["method"], key: value}}
        if (value != before or type(value) is not type(before)) and _accepted(changed):
            yield changed
