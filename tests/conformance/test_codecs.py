"""What every codec must do, whoever registers it."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import strategy as flower
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlora.clients import client_app
from fedlora.communication import meter
from fedlora.communication.codecs import Codec, RunCodecs, get_codec, named, run_codecs
from fedlora.communication.wire import encode, payload_bytes
from fedlora.config import Config, WireSection, load_config
from fedlora.errors import InputError
from fedlora.flower import act_as
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.registry import CODECS
from fedlora.results.folder import RunResult
from fedlora.strategies.replies import ReplyError, read_update
from fedlora.study.forecast import Forecast
from tests import tiny
from tests.configs import override
from tests.llama_runs import OWNERS, LlamaRuns, adapter, lines, payload

shapes = st.dictionaries(st.text("abc.", max_size=4), st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=5)
scales = st.floats(-6, 4).map(lambda exponent: 10.0**exponent)


@pytest.fixture(params=CODECS.names())
def codec(request: pytest.FixtureRequest) -> Codec:
    return get_codec(request.param)


def wire_of(codec: Codec) -> dict[str, str]:
    """Return ``[wire]`` with the codec wherever it may be."""
    return {"uplink_codec" if codec.updates_only else "codec": codec.name}


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = draw(scales)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in draw(shapes).items()}


def bits(found: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: array.contiguous().numpy().tobytes() for name, array in found.items()}


def the_same(record: ArrayRecord) -> dict[str, tuple[str, str, tuple[int, ...], bytes]]:
    return {name: (a.dtype, a.stype, tuple(a.shape), a.data) for name, a in record.items()}


def test_what_is_measured_is_the_formula(codec: Codec) -> None:
    @given(arrays())
    @settings(max_examples=30)
    def check(sent: dict[str, torch.Tensor]) -> None:
        record = codec.encode(sent)
        assert payload_bytes(record) == sum(codec.payload_bytes(tuple(array.shape)) for array in sent.values())

    check()


def test_what_comes_back(codec: Codec) -> None:
    @given(arrays())
    @settings(max_examples=30)
    def check(sent: dict[str, torch.Tensor]) -> None:
        record = codec.encode(sent)
        found = codec.decode(record)
        assert list(found) == list(sent)
        for name, array in sent.items():
            assert (found[name].dtype, found[name].shape) == (codec.dtype, array.shape)
            if codec.updates_only:
                # What is left out is shorter than what was sent, by an entry's share at the least.
                left = torch.linalg.vector_norm(found[name].double() - array) ** 2
                whole = torch.linalg.vector_norm(array.double()) ** 2
                assert left <= whole * (1 + 1e-6 - 1 / max(1, array.numel())) + 1e-30
            elif codec.lossy:
                error = torch.linalg.vector_norm(found[name] - array)
                assert error <= 0.02 * torch.linalg.vector_norm(array) + 1e-7 * math.sqrt(array.numel())
            else:
                assert torch.equal(found[name], array.to(codec.dtype))
        vector = codec.decode_vector(record, {name: tuple(array.shape) for name, array in sent.items()})
        assert vector.dtype == codec.dtype
        assert bits(named(vector, {name: tuple(array.shape) for name, array in sent.items()})) == bits(found)
        # A resumed run sends what it has decoded.
        assert the_same(codec.encode(found)) == the_same(record)
        # And as Flower sends it.
        again = recorddict_from_proto(recorddict_to_proto(RecordDict({"r": record})))["r"]
        assert isinstance(again, ArrayRecord)
        assert bits(codec.decode(again)) == bits(found)

    check()


def test_what_was_decoded_is_encoded_to_the_same_bytes_whatever_its_size(codec: Codec) -> None:
    @example([0.0] * 5 + [1.5619339035493338e-37])  # its int8 scale is 0
    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=6, max_size=6))
    @settings(max_examples=60)
    def check(numbers: list[float]) -> None:
        record = codec.encode({"x": torch.tensor(numbers).view(2, 3)})
        found = codec.decode(record)
        if found["x"].isfinite().all():
            assert the_same(codec.encode(found)) == the_same(record)

    check()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3,), (4, 3), (1,)])
def test_what_is_not_finite_stays_so(codec: Codec, wrong: float, shape: tuple[int, ...]) -> None:
    sent = torch.ones(shape)
    sent.view(-1)[0] = wrong
    assert not codec.decode(codec.encode({"x": sent}))["x"].isfinite().all()


def test_zeros_stay_zero_and_signs_stay(codec: Codec) -> None:
    sent = {"zero": torch.zeros(3, 4), "row": torch.tensor([[0.0, 0.0], [1.0, -1.0]]), "tiny": torch.full((2,), 1e-30)}
    found = codec.decode(codec.encode(sent))
    assert torch.equal(found["zero"], torch.zeros(3, 4, dtype=codec.dtype))
    there = (found["row"] != 0) & (sent["row"] != 0) if codec.updates_only else torch.ones(2, 2, dtype=torch.bool)
    assert there.any()
    assert torch.equal(found["row"].sign()[there], sent["row"].sign().to(codec.dtype)[there])
    assert found["tiny"].isfinite().all()


def test_what_was_not_asked_for_is_refused(codec: Codec) -> None:
    sent = {"a": torch.randn(3, 4), "b": torch.randn(2)}
    asked = {"a": (3, 4), "b": (2,)}
    record = codec.encode(sent)
    assert codec.decode_vector(record, asked).shape == (14,)
    for wrong in ({"a": (3, 4)}, {**asked, "c": (1,)}, {**asked, "a": (4, 3)}, {**asked, "b": (3,)}):
        with pytest.raises(ValueError, match="has shape"):
            codec.decode_vector(record, wrong)
    for other in map(get_codec, CODECS.names()):
        if other is not codec:
            with pytest.raises(ValueError, match=r"[ab] is |are not those"):
                codec.decode_vector(other.encode(sent), asked)


def test_damaged_bytes_are_numbers_or_refused(codec: Codec) -> None:
    @given(st.binary(max_size=40), st.integers(0, 150), st.binary(max_size=3), st.sampled_from(["", "numpy.ndarray"]))
    @settings(max_examples=60)
    def check(rest: bytes, at: int, end: bytes, stype: str) -> None:
        whole = codec.encode({"x": torch.ones(2, 3)})["x"]
        data = whole.data[:at] + rest + whole.data[at + len(rest) :] + end
        record = ArrayRecord({"x": Array(whole.dtype, (2, 3), stype or whole.stype, data)})
        with contextlib.suppress(ValueError):
            assert codec.decode_vector(record, {"x": (2, 3)}).shape == (6,)
        with contextlib.suppress(ValueError):
            codec.decode(record)
        assert payload_bytes(record) <= len(data)

    check()


def test_many_small_arrays_take_no_longer_than_a_few_conversions(codec: Codec) -> None:
    """An adapter's arrays are many and small. The bound is far above what they take, which varies on a busy machine."""
    sent = {f"layer.{i}": torch.randn(8, 16) for i in range(500)}
    asked = {name: (8, 16) for name in sent}
    codec.decode_vector(codec.encode(sent), asked)
    began = time.process_time()
    codec.decode_vector(codec.encode(sent), asked)
    assert time.process_time() - began < 0.5


def record_of(codec: Codec, shape: tuple[int, ...], data: bytes) -> ArrayRecord:
    whole = codec.encode({"x": torch.ones(shape)})["x"]
    return ArrayRecord({"x": Array(whole.dtype, shape, whole.stype, data)})


@given(st.lists(st.integers(0, 299), min_size=3, max_size=3), st.integers(0, 2))
def test_places_outside_of_an_array_or_twice_are_refused(places: list[int], wide: int) -> None:
    """Whatever a client sends as places, the server takes increasing ones inside of the array alone."""
    shape = ((60,), (20, 15), (300, 250))[wide]
    codec = get_codec("topk", WireSection(topk_fraction=3 / math.prod(shape)))
    values = np.array([1.0, -2.0, 3.0], np.float32)
    data = np.array(places).astype(("<u1", "<u2", "<u4")[wide]).tobytes() + values.tobytes()
    assert len(data) == codec.payload_bytes(shape)
    stored = [place % 256 for place in places] if wide == 0 else places
    record, asked = record_of(codec, shape, data), {"x": shape}
    if stored[0] < stored[1] < stored[2] < math.prod(shape):
        found = codec.decode_vector(record, asked)
        assert found[stored].tolist() == values.tolist()
        assert (found != 0).sum() == 3
    else:
        with pytest.raises(ValueError, match="do not increase, or leave an array"):
            codec.decode_vector(record, asked)


@pytest.mark.parametrize("scale", [-1.0, -math.inf, math.inf, math.nan])
def test_a_scale_that_is_no_size_costs_its_client_the_round(scale: float) -> None:
    act_as(1, 1)  # a message belongs to a run
    codec = get_codec("onebit")
    record = record_of(codec, (3, 5), np.array(scale, "<f4").tobytes() + b"\xf0\x0f")
    message = Message(RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 3})}), 1, "train")
    with pytest.raises(ReplyError, match=r"scale of an array is -|x is not finite"):
        read_update(message, {"x": (3, 5)}, codec, mechanism=mechanism_of(load_config(override("run.seed", 0))))


@pytest.mark.parametrize("fraction", [1e-6, 0.05, 0.3, 1.0])
def test_topk_sends_the_largest(fraction: float) -> None:
    @given(arrays())
    @settings(max_examples=20)
    def check(sent: dict[str, torch.Tensor]) -> None:
        codec = get_codec("topk", WireSection(topk_fraction=fraction))
        record = codec.encode(sent)
        assert payload_bytes(record) == sum(codec.payload_bytes(tuple(array.shape)) for array in sent.values())
        for name, array in codec.decode(record).items():
            count = max(1, round(fraction * array.numel()))
            kept = array.flatten().abs().sort(descending=True).values[:count]
            assert torch.equal(kept, sent[name].flatten().abs().sort(descending=True).values[:count])
            assert (array.count_nonzero() <= count) or not array.numel()

    check()


def test_int8_takes_about_a_quarter_whatever_the_rank() -> None:
    for shape in ((384, 8), (8, 384), (8, 8), (384, 4), (16, 16), (770,)):
        found, full = (get_codec(name).payload_bytes(shape) for name in ("int8", "float32"))
        assert full < 4 * found <= 1.07 * full


def test_onebit_takes_less_than_a_twentieth_for_real_adapters() -> None:
    """MiniLM's: 12 layers of 384 x 384 at rank 8, and a head of two classes; the scales are counted."""
    head, layers = [(2, 384), (2,)], 12
    for factor in ((8, 8), (384, 8), (16, 16)):
        shapes = [*head, *[factor] * layers]
        found, full = (sum(map(get_codec(name).payload_bytes, shapes)) for name in ("onebit", "float32"))
        assert 20 * found < full


@cache
def arrays_of(method: str) -> list[dict[str, torch.Tensor]]:
    """What a method sends in a round, and all that it has."""
    adapted = tiny.adapted_model("bert", tiny.settings(method={"name": method}))
    return [adapted.arrays(adapted.names(tiny.FACTORS[method][1])), adapted.arrays()]


@pytest.mark.parametrize("method", tiny.FACTORS)
def test_the_arrays_of_every_method_have_the_formulas_bytes(codec: Codec, method: str) -> None:
    for sent in arrays_of(method):
        formula = sum(codec.payload_bytes(tuple(array.shape)) for array in sent.values())
        assert payload_bytes(codec.encode(sent)) == formula


def test_configs_take_its_name(codec: Codec) -> None:
    up = run_codecs(load_config(override("wire.uplink_codec", codec.name)))
    assert up.up is codec
    assert up.down is get_codec("float32")
    if codec.updates_only:
        for key in ("wire.codec", "wire.downlink_codec"):
            with pytest.raises(InputError, match=rf"{key} = '{codec.name}': encodes updates, but values go down"):
                load_config(override(key, codec.name))
        return
    codecs = run_codecs(load_config(override("wire.codec", codec.name)))
    assert codecs.up is codecs.down is codec
    assert not codecs.once.lossy
    assert run_codecs(load_config(override("wire.downlink_codec", codec.name))).down is codec


def test_other_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"wire\.codec = 'int7': should be .*'float32'"):
        load_config(override("wire.codec", "int7"))


@pytest.mark.parametrize(("dtype", "name"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
def test_by_default_nothing_is_rounded(dtype: str, name: str) -> None:
    codecs = run_codecs(load_config(override("model.dtype", dtype)))
    assert {codecs.up.name, codecs.down.name, codecs.once.name} == {name}
    sent = {"x": torch.randn(3, 2, dtype=codecs.up.dtype), "y": torch.randn(4, dtype=codecs.up.dtype)}
    assert the_same(codecs.up.encode(sent)) == the_same(encode(sent, codecs.up.dtype))


PRIVATE = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[str, str]]]:
    """Of every message that is metered: the records' keys, and how their arrays are encoded."""
    found: dict[str, set[tuple[str, str]]] = {}

    def noted(message: Message) -> int:
        for key, record in message.content.items() if message.has_content() else ():
            if isinstance(record, ArrayRecord):
                found.setdefault(key, set()).update((array.stype, array.dtype) for array in record.values())
        return size_of(message)

    size_of = meter.message_size
    monkeypatch.setattr(meter, "message_size", noted)
    return found


def check_bytes(result: RunResult, expected: Forecast) -> None:
    """What was measured, the formula and the forecast agree, in every direction."""
    said = {"initial": expected.initial_bytes, "down": expected.downlink_bytes, "up": expected.uplink_bytes}
    assert {direction: payload(result, direction) for direction in said} == said


@pytest.mark.parametrize("method", ["ffa-lora", "flexmore"])
def test_a_run_sends_what_the_formula_counts_and_resumes_to_the_same_bits(
    codec: Codec, method: str, runs: LlamaRuns, sent: dict[str, set[tuple[str, str]]]
) -> None:
    sections = {"method": {"name": method, "rank": 2}, "wire": wire_of(codec), "run": {"rounds": 2, "seed": 3}}
    if codec.updates_only and method == "flexmore":
        with pytest.raises(InputError, match="make a start that the server does not hold"):
            runs.config(**sections)
        return
    whole = runs.run(**sections)
    sent_in_rounds = {stype for stype, _ in sent["arrays"]} - ({"numpy.ndarray"} if codec.updates_only else set())
    assert sent_in_rounds == {next(iter(codec.encode({"x": torch.ones(2)}).values())).stype}
    # What is sent once stays as it is: both halves hold the same bits.
    assert sent.get("initial", {("numpy.ndarray", "float32")}) == {("numpy.ndarray", "float32")}
    assert all(line["counted"] and not line["failed"] for line in lines(whole))
    check_bytes(whole, runs.forecast(**sections))
    if method == "flexmore":
        return
    assert bits(adapter(runs.run(**sections, stop=1))) == bits(adapter(whole))
    plain = adapter(runs.run(method=sections["method"], run=sections["run"]))
    assert (bits(adapter(whole)) == bits(plain)) == (not codec.lossy)
    allowed = 2.0 if codec.updates_only else 0.05  # of the largest number: after two rounds most of a move is due
    for name, array in adapter(whole).items():
        torch.testing.assert_close(array, plain[name], rtol=0, atol=allowed * float(plain[name].abs().max()))


def test_each_way_has_its_own(runs: LlamaRuns) -> None:
    one = {"run": {"rounds": 2, "seed": 3}, "method": {"name": "fedit", "rank": 2}}
    whole, up, down = (
        runs.run(**one, wire=wire) for wire in ({}, {"uplink_codec": "int8"}, {"downlink_codec": "float16"})
    )
    assert payload(up, "down") == payload(whole, "down")
    assert payload(whole, "up") / 4 < payload(up, "up") < payload(whole, "up") / 2
    assert (payload(down, "down"), payload(down, "up")) == (payload(whole, "down") // 2, payload(whole, "up"))


def test_rounding_comes_after_the_noise(codec: Codec, runs: LlamaRuns) -> None:
    """A ledger is charged alike whatever the codec."""
    found, plain = (runs.run(privacy=PRIVATE, wire=wire, run={"rounds": 2, "seed": 3}) for wire in (wire_of(codec), {}))
    assert found.summary["epsilon"] == plain.summary["epsilon"] is not None
    check_bytes(found, runs.forecast(privacy=PRIVATE, wire=wire_of(codec), run={"rounds": 2, "seed": 3}))


def test_a_users_own_strategy_knows_of_no_codec(codec: Codec, runs: LlamaRuns) -> None:
    """It averages float32 numbers, whatever travels."""
    # Its mean differs in the last bits, by which the next round's updates may be cut otherwise.
    one = {"run": {"rounds": 1 if codec.updates_only else 2, "seed": 3}, "wire": wire_of(codec)}
    own = runs.run(**one, strategy=lambda: flower.FedAvg(fraction_evaluate=0.0))
    found, expected = adapter(own), adapter(runs.run(**one))
    check_bytes(own, runs.forecast(**one))
    for name, array in expected.items():
        torch.testing.assert_close(found[name], array, rtol=0, atol=0.02 * float(array.abs().max()))


@pytest.mark.parametrize("own", [False, True])
def test_a_reply_in_another_codec_is_refused(own: bool, runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs its client its place in the round, by the method itself and by a user's own strategy."""
    reply, codecs = client_app.run_codecs, {"int8": 0}

    def other(config: Config) -> RunCodecs:
        codecs["int8"] += 1
        found = reply(config)
        # Every client asks twice in a round, to decode and to encode; the last one's answer is another's.
        return replace(found, up=found.once) if codecs["int8"] == 2 * OWNERS else found

    monkeypatch.setattr(client_app, "run_codecs", other)
    strategy = (lambda: flower.FedAvg(fraction_evaluate=0.0)) if own else None
    result = runs.run(run={"rounds": 1, "seed": 3}, wire={"uplink_codec": "int8"}, strategy=strategy)
    (line,) = lines(result)
    (failed,) = line["failed"]
    assert failed["error"].startswith("the reply is refused: ")
    assert failed["error"].endswith("expected fedlora.int8")
    assert line["counted"]
