"""What every codec must do, whoever registers it."""

from __future__ import annotations

import contextlib
import math
import time
from functools import cache

import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.communication.codecs import Codec, get_codec, named, run_codecs
from fedlora.communication.wire import encode, payload_bytes
from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.registry import CODECS
from tests import tiny
from tests.configs import override

shapes = st.dictionaries(st.text("abc.", max_size=4), st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=5)
scales = st.floats(-6, 4).map(lambda exponent: 10.0**exponent)


@pytest.fixture(params=CODECS.names())
def codec(request: pytest.FixtureRequest) -> Codec:
    return get_codec(request.param)


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
            if codec.lossy:
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
    assert torch.equal(found["row"].sign(), sent["row"].sign().to(codec.dtype))
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
    codecs = run_codecs(load_config(override("wire.codec", codec.name)))
    assert codecs.up is codecs.down is codec
    assert not codecs.once.lossy
    assert run_codecs(load_config(override("wire.uplink_codec", codec.name))).up is codec
    assert run_codecs(load_config(override("wire.uplink_codec", codec.name))).down is get_codec("float32")
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
