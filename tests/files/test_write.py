"""The streaming writer, read back by the safetensors library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from fourierft_export.files.write import (
    IN_FLIGHT,
    PIECE,
    FileWriter,
    Slot,
    TensorWriter,
    sort_slots,
)

VALUES = {
    "d": ("F64", np.arange(2, dtype=np.float64)),
    "a": ("F32", np.arange(6, dtype=">f4").reshape(3, 2).T),  # big-endian, and not contiguous
    "h": ("BF16", np.arange(3).astype(ml_dtypes.bfloat16)),
    "e": ("I8", np.empty((0, 4), np.int8)),
}
SLOTS = [Slot(name, dtype, value.shape) for name, (dtype, value) in VALUES.items()]


def test_the_safetensors_library_reads_it_back(tmp_path: Path) -> None:
    path, own = tmp_path / "x.safetensors", hashlib.sha256()
    with TensorWriter(path, SLOTS, {"format": "pt"}) as writer:
        for name, (_, value) in VALUES.items():
            writer.write([value[:1], value[1:]], own if name == "d" else None)
        digest = writer.finish()
    found = load_file(path)
    assert set(found) == set(VALUES)
    for name, (_, value) in VALUES.items():
        assert tuple(found[name].shape) == value.shape
        np.testing.assert_array_equal(found[name].double().numpy(), value.astype(float))
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert writer.size == path.stat().st_size
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert own.digest() == hashlib.sha256(VALUES["d"][1].tobytes()).digest()


def test_misuse_is_an_error(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "x", SLOTS[:2]) as writer:
        with pytest.raises(ValueError, match="takes 16 bytes, not 8"):
            writer.write([b"12345678"])
        with pytest.raises(ValueError, match="never written"):
            writer.finish()
        writer.write([bytes(24)])
        with pytest.raises(ValueError, match="all tensors are written"):
            writer.write([])
    with pytest.raises(FileExistsError), TensorWriter(tmp_path / "x", SLOTS):
        raise AssertionError("an existing file must not be opened")


def test_order_keeps_every_payload_aligned() -> None:
    slots = [Slot("half", "F16", (3,)), Slot("long", "I64", (1,)), Slot("byte", "U8", (1,)),
             Slot("half2", "BF16", (1,)), Slot("float", "F32", (1,))]  # fmt: skip
    assert [s.name for s in sort_slots(slots)] == ["long", "float", "half", "half2", "byte"]


def test_pieces_of_any_size_arrive_in_order_and_are_hashed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes = [0, 1, PIECE, PIECE + 3, 5, IN_FLIGHT + 7, 2]
    pieces = [random.integers(0, 256, size, np.uint8).tobytes() for size in sizes]
    own = hashlib.sha256()
    with FileWriter(tmp_path / "x") as file:
        for number, piece in enumerate(pieces):
            file.put(memoryview(piece), own if number % 2 else None)
        digest = file.finish()
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)
    assert digest == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert own.hexdigest() == hashlib.sha256(b"".join(pieces[1::2])).hexdigest()


def test_a_write_that_fails_in_its_thread_is_raised_by_the_next_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview) -> int:
        raise OSError("full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"), FileWriter(tmp_path / "x") as file:
        for _ in range(100):
            file.put(memoryview(bytes(PIECE)))
    with pytest.raises(OSError, match="full"), FileWriter(tmp_path / "y") as file:
        file.put(memoryview(b"x"))
        file.finish()
