"""The strict reading of safetensors headers: what the library writes, and what nobody should."""

from __future__ import annotations

import json
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors import deserialize
from safetensors.numpy import save

from fourierft_export.errors import BadInputError, FileAccessError, FourierFTError, printable
from fourierft_export.files import dtypes
from fourierft_export.files.safetensors_reader import (
    decode_header_length,
    encode_header,
    open_regular,
    parse_header,
    read_header,
)

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I8", "shape": [], "data_offsets": [24, 25]}}  # fmt: skip


def container(header: object, payload: bytes = bytes(25)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def parse(data: bytes) -> Any:
    length = decode_header_length(data[:8], len(data), "here")
    return parse_header(data[8 : 8 + length], len(data), "here")


def changed(**fields: object) -> dict[str, Any]:
    return {**GOOD, "a": {**GOOD["a"], **fields}}


def test_offsets_are_those_of_the_file(tmp_path: Path) -> None:
    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.arange(3, dtype=np.int8)}
    data = save(values, {"format": "pt", "note": "é"})
    (tmp_path / "f.safetensors").write_bytes(data)
    header = read_header(tmp_path / "f.safetensors")
    assert header.metadata == {"format": "pt", "note": "é"}
    assert header.size == len(data)
    for name, value in values.items():
        info = header.tensors[name]
        assert data[info.start : info.stop] == value.tobytes()
        assert info.shape == value.shape
        assert info.nbytes == value.nbytes
        assert info.path == tmp_path / "f.safetensors"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file"),
        (b"\x01\x02", "a file of 2 bytes"),
        (container(GOOD)[:-1], "bytes, as its header says"),
        (container(GOOD) + b"\0", "bytes, as its header says"),
        (container(GOOD)[:40], "header length"),
        (struct.pack("<Q", 2**63) + b"{}", "header length"),
        (struct.pack("<Q", 90_000_000) + bytes(1016), "header length"),
        (struct.pack("<Q", 0) + b"{}", "header length"),
        (b"PK\x03\x04" + bytes(100), "pickle or zip"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", "pickle"),
        (container([1]), "JSON object as header"),
        (container(b"{]"), "strict JSON"),
        (container(b'{"__metadata__": {"k": "1", "k": "2"}}', b""), "twice"),
        (container({**GOOD, "__metadata__": {"k": 1}}), "maps text to text"),
        (container({**GOOD, "__metadata__": ["k"]}), "maps text to text"),
        (container(changed(shape=[2, True])), "a shape of"),
        (container(changed(shape=[2, 1.5])), "a shape of"),
        (container(changed(shape=[-2, -3])), "a shape of"),
        *((container(changed(shape=axes)), "at most")
          for axes in ([2**62, 4], [1] * 33, [2**62] * 17, [2**62] * 5000, [2**62, 4, 0])),
        (container(changed(shape=[2**63, 0])), "a shape of"),
        (container(changed(shape="23")), "a shape of"),
        (container(changed(shape=[3, 3])), "36 bytes for F32"),
        (container(changed(dtype="F33")), "a known dtype"),
        (container(changed(dtype=["F32"])), "a known dtype"),
        (container(changed(extra=1)), "exactly dtype, shape and data_offsets"),
        (container({"a": 3}), "exactly dtype, shape and data_offsets"),
        (container(changed(data_offsets=[0, 24, 25])), "two byte offsets"),
        (container(changed(data_offsets=[-1, 23])), "two byte offsets"),
        (container(changed(data_offsets=[24, 0])), "bytes for F32"),
        (container(changed(data_offsets=[1, 25])), "overlap or leave a hole"),
        (container({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [25, 26]}}, bytes(26)),
         "overlap or leave a hole"),
        (container({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"\0"),
         "2 bytes for F4"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(data: bytes, says: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse(data)
    assert says in str(caught.value)
    assert "here" in caught.value.where
    assert caught.value.exit_code == 3


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=3)
tables = st.dictionaries(names, st.tuples(st.sampled_from(["F32", "F16", "U8", "I64"]), shapes))


@settings(max_examples=100, deadline=None)
@given(tables, st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=8)))
def test_headers_written_here_are_read_by_the_library_and_here(
    table: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    order = sorted(table, key=lambda name: -dtypes.DTYPE_BITS[table[name][0]])
    head = encode_header([(n, table[n][0], tuple(table[n][1])) for n in order], metadata)
    sizes = [dtypes.DTYPE_BITS[d] // 8 * int(np.prod(s)) for d, s in (table[n] for n in order)]
    data = head + bytes(sum(sizes))
    header = parse(data)
    assert list(header.tensors) == order or 0 in sizes
    assert header.metadata == metadata
    assert len(head) % 8 == 0
    theirs = dict(deserialize(data))
    assert set(theirs) == set(table)
    for name, info in header.tensors.items():
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_give_the_packages_own_error_or_a_sound_header(data: st.DataObject) -> None:
    good = bytearray(container({**GOOD, "__metadata__": {"format": "pt"}}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    try:
        header = parse(bytes(good))
    except FourierFTError:
        return
    spans = sorted((info.start, info.stop) for info in header.tensors.values())
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert spans == [] or spans[-1][1] == len(good)


@pytest.mark.parametrize("kind", ["absent", "folder", "fifo", "device", "nul"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = {"device": Path("/dev/null"), "nul": Path("a\0b")}.get(kind, tmp_path / kind)
    if kind == "folder":
        path.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    error = FileAccessError if kind in ("absent", "nul") else BadInputError
    with pytest.raises(error) as caught:
        open_regular(path)
    assert printable(path) in caught.value.where


def test_dtypes_have_the_sizes_that_the_format_says() -> None:
    for name, bits in dtypes.DTYPE_BITS.items():
        if bits % 8:
            with pytest.raises(KeyError):
                dtypes.to_numpy(name)
        else:
            assert dtypes.to_numpy(name).itemsize * 8 == bits
            assert dtypes.to_name(dtypes.to_numpy(name)) == name
    assert dtypes.to_numpy("BF16") == ml_dtypes.bfloat16
    assert dtypes.to_name(np.dtype(">f4")) == "F32"


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 640 + 65536])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int) -> None:
    """640 is 0x0280: its first two bytes are those of a pickle."""
    text = json.dumps(GOOD).encode().ljust(length)
    data = struct.pack("<Q", length) + text + bytes(25)
    assert data[0] == 0x80
    assert set(parse(data).tensors) == {"a", "b"}
