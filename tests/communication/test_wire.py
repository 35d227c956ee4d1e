"""Arrays on the wire: values, dtypes, and a digest that any bit changes."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.communication.wire import decode, decode_as, digest, encode, payload_bytes, wire_dtype
from fedlora.flower import from_bytes, to_bytes

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@st.composite
def named_arrays(draw: st.DrawFn, min_size: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    drawn = draw(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), shapes, min_size=min_size))
    return {name: torch.randn(shape, generator=generator) for name, shape in drawn.items()}


@given(named_arrays(), dtypes, st.sampled_from([torch.float32, torch.float64]))
def test_what_is_decoded_is_what_was_encoded(
    arrays: dict[str, torch.Tensor], dtype: torch.dtype, wire: torch.dtype
) -> None:
    arrays = {name: array.to(dtype) for name, array in arrays.items()}
    record = encode(arrays, wire)
    decoded = decode(record)
    assert list(decoded) == list(arrays)
    for name, array in arrays.items():
        assert decoded[name].dtype == wire
        assert decoded[name].shape == array.shape
        assert torch.equal(decoded[name], array.to(wire))
    numbers = sum(array.numel() for array in arrays.values())
    assert payload_bytes(record) == numbers * torch.finfo(wire).bits // 8


@given(named_arrays(), st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.randoms())
def test_a_vector_holds_the_same_numbers_in_the_order_that_was_asked_for(
    arrays: dict[str, torch.Tensor], wire: torch.dtype, fortran: bool, random: Any
) -> None:
    numbers = {name: array.to(wire).numpy() for name, array in arrays.items()}
    record = ArrayRecord({n: Array(np.asfortranarray(a) if fortran and a.ndim else a) for n, a in numbers.items()})
    names = list(arrays)
    random.shuffle(names)
    vector = decode_as(record, {name: tuple(arrays[name].shape) for name in names}, wire)
    assert vector.dtype == wire
    assert torch.equal(vector, torch.cat([torch.empty(0, dtype=wire), *(decode(record)[n].flatten() for n in names)]))
    vector += 1  # it is the caller's own


HEADERS = {
    "unbalanced": b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), ",
    "nested": b"(" * 300 + b")" * 300,
    "huge": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
    "huge of nothing": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 0, 1000000000000), }",
    "huge in Fortran's order": b"{'descr': '<f4', 'fortran_order': True, 'shape': (1000000, 1000000), }",
    "no size": b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,), }",
    "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, -1), }",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "a record": b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }",
    "big-endian": b"{'descr': '>f4', 'fortran_order': False, 'shape': (3,), }",
    "text": b"\xff\xfe",
    "code": b"__import__('os').abort()",
}


class Bomb:
    """Ends the test if it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("version", [1, 2, 3, 9])
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_wrong_is_refused_whatever_it_makes_a_reader_raise(name: str, version: int) -> None:
    header = HEADERS[name]
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    rest = pickle.dumps(np.array([Bomb()], object)) if name == "objects" else b"\0" * 12
    for body in (rest, b""):
        data = b"\x93NUMPY" + bytes([version, 0]) + length + header + body
        record = ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", data)})
        with pytest.raises(ValueError, match="cannot be read"):
            decode(record)
        with pytest.raises(ValueError, match="not those of float32 numbers"):
            decode_as(record, {"x": (3,)}, torch.float32)
        assert payload_bytes(record) <= len(data)


@given(st.binary(max_size=60), st.integers(0, 130), st.binary(max_size=4))
def test_a_damaged_array_is_read_as_what_it_is_or_refused(rest: bytes, at: int, end: bytes) -> None:
    """Nothing but a ValueError, and no other numbers than those that were asked for."""
    whole = Array(np.ones(3, np.float32)).data
    data = whole[:at] + rest + whole[at + len(rest) :] + end
    record = ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", data)})
    with contextlib.suppress(ValueError):
        decode(record)
    with contextlib.suppress(ValueError):
        assert decode_as(record, {"x": (3,)}, torch.float32).shape == (3,)
        assert data[:-12] == whole[:-12]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (Array(np.ones(3)), "x is of float64, expected float32"),
        (Array(np.ones(3, np.float16)), "x is of float16, expected float32"),
        (Array(np.ones((1, 3), np.float32)), r"x has shape \(1, 3\), expected \(3,\)"),
        (Array(np.ones(3, ">f4")), "expected float32"),
        (Array("\x1b[31m", (3,), "numpy.ndarray", b""), r"x is of \\x1b\[31m, expected float32"),
        (Array("float32", (3,), "numpy.ndarray", Array(np.ones(3)).data), "not those of float32 numbers"),
    ],
)
def test_arrays_of_another_kind_than_was_asked_for_are_named(array: Array, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode_as(ArrayRecord({"x": array}), {"x": (3,)}, torch.float32)


@pytest.mark.parametrize(
    ("names", "said"), [(["y", "x"], "y has shape"), ([], "x has shape None"), (["\x1b", "x"], r"\\x1b has shape")]
)
def test_names_are_those_that_were_asked_for(names: list[str], said: str) -> None:
    record = encode(dict.fromkeys(names, torch.ones(3)))
    with pytest.raises(ValueError, match=said):
        decode_as(record, {"x": (3,)}, torch.float32)


@given(named_arrays(), st.sampled_from([torch.float32, torch.float64]))
def test_the_bytes_are_those_that_flower_writes(arrays: dict[str, torch.Tensor], wire: torch.dtype) -> None:
    for name, array in encode(arrays, wire).items():
        expected = Array(arrays[name].to(wire).numpy())
        assert (array.dtype, array.shape, array.stype) == (expected.dtype, expected.shape, expected.stype)
        assert array.data == expected.data


@given(st.binary(max_size=200), st.integers(0, 10))
def test_bytes_that_are_no_array_are_refused(rest: bytes, cut: int) -> None:
    whole = Array(np.ones(3, np.float32))
    for data in (whole.data[:-cut] if cut else whole.data + b"\0", whole.data[:10] + rest, rest):
        if data == whole.data:
            continue
        record = ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", data)})
        with pytest.raises(ValueError, match=r"."):
            decode(record)
        with pytest.raises(ValueError, match=r"."):
            decode_as(record, {"x": (3,)}, torch.float32)


def test_arrays_of_other_orders_and_kinds_are_read_or_refused() -> None:
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert torch.equal(decode(ArrayRecord({"x": Array(fortran)}))["x"], torch.from_numpy(fortran))
    with pytest.raises(ValueError, match="cannot be read"):
        decode(ArrayRecord({"x": Array(np.array(["a", "bc"]))}))
    with pytest.raises(ValueError, match="cannot be read"):
        decode(ArrayRecord({"x": Array("float32", (1,), "other", b"")}))


def test_values_keep_every_bit() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4028235e38])
    decoded = decode(encode({"x": odd}))["x"]
    assert decoded.numpy().tobytes() == odd.numpy().tobytes()


def test_views_and_gradients_are_encoded_by_value() -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    record = encode({"t": base.T, "s": base[:, ::2]})
    assert torch.equal(decode(record)["t"], base.detach().T)
    assert torch.equal(decode(record)["s"], base.detach()[:, ::2])


def test_decoded_arrays_may_be_written_and_leave_the_record_alone() -> None:
    record = encode({"x": torch.zeros(3)})
    decode(record)["x"].add_(1)
    assert torch.equal(decode(record)["x"], torch.zeros(3))


def test_the_record_survives_flowers_serialisation() -> None:
    arrays = {"a": torch.randn(2, 3), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    again = from_bytes(to_bytes(RecordDict({"r": encode(arrays)})))["r"]
    assert isinstance(again, ArrayRecord)
    for name, array in decode(again).items():
        assert torch.equal(array, arrays[name])


@pytest.mark.parametrize(("model", "wire"), [("float64", torch.float64), ("float32", torch.float32)])
def test_the_wire_has_the_models_dtype(model: str, wire: torch.dtype) -> None:
    assert wire_dtype(model) == wire


def test_bfloat16_travels_as_float32() -> None:
    assert wire_dtype("bfloat16") == torch.float32


@given(named_arrays(min_size=1), st.data())
def test_any_bit_changes_the_digest(arrays: dict[str, torch.Tensor], data: st.DataObject) -> None:
    before = digest(arrays)
    name = data.draw(st.sampled_from(sorted(arrays)))
    changed = {n: a.clone() for n, a in arrays.items()}
    if changed[name].numel():
        raw = changed[name].numpy().reshape(-1).view(np.uint8)
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << (bit % 8)
    else:
        changed[name] = torch.zeros(*changed[name].shape, 1)
    assert digest(changed) != before
    assert digest(arrays) == before


@given(named_arrays(min_size=1))
def test_the_digest_sees_names_shapes_and_dtypes_but_not_order(arrays: dict[str, torch.Tensor]) -> None:
    before = digest(arrays)
    assert digest(dict(reversed(arrays.items()))) == before
    name = next(iter(arrays))
    rest = {n: a for n, a in arrays.items() if n != name}
    assert digest(rest) != before
    assert digest({**rest, name + "'": arrays[name]}) != before
    assert digest({**rest, name: arrays[name][None]}) != before
    assert digest({**rest, name: arrays[name].double()}) != before


def test_the_digest_is_by_value() -> None:
    array = torch.arange(6.0).reshape(2, 3)
    assert digest({"x": array.T}) == digest({"x": array.T.contiguous()})
    assert digest({"x": array}) != digest({"x": array.reshape(3, 2)})
    assert len({digest({}), digest({"": torch.zeros(0)}), digest({"x": torch.zeros(0)})}) == 3
