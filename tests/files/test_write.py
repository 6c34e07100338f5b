"""The streaming writer, read back by the safetensors library."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from fourierft_export.errors import FileAccessError
from fourierft_export.files.write import (
    IN_FLIGHT,
    PIECE,
    FileWriter,
    Slot,
    TensorWriter,
    in_file_order,
)

SLOTS = (Slot("d", "F64", (2,)), Slot("a", "F32", (2, 3)), Slot("h", "BF16", (3,)),
         Slot("e", "I8", (0, 4)))  # fmt: skip


def payload(slot: Slot) -> np.ndarray:
    dtype = {"F64": np.float64, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "I8": np.int8}
    return np.arange(np.prod(slot.shape)).reshape(slot.shape).astype(dtype[slot.dtype])


def written(path: Path) -> str:
    with TensorWriter(path, SLOTS, {"format": "pt"}) as writer:
        for slot in SLOTS:
            writer.write(slot.name, [payload(slot)])
        return writer.digest()


def test_the_safetensors_library_reads_it_back(tmp_path: Path) -> None:
    digest = written(tmp_path / "x.safetensors")
    found = load_torch(tmp_path / "x.safetensors")
    assert set(found) == {slot.name for slot in SLOTS}
    for slot in SLOTS:
        assert tuple(found[slot.name].shape) == slot.shape
        np.testing.assert_array_equal(
            found[slot.name].double().numpy(), payload(slot).astype(float)
        )
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_payloads_may_come_in_pieces_and_strides(tmp_path: Path) -> None:
    value = np.arange(6, dtype=">f4").reshape(3, 2).T
    with TensorWriter(tmp_path / "x", [Slot("a", "F32", (2, 3))]) as writer:
        writer.write("a", [value[:1], memoryview(value[1:].astype("<f4").tobytes())])
        writer.digest()
    np.testing.assert_array_equal(load_file(tmp_path / "x")["a"], value)


def test_misuse_is_an_error(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "x", SLOTS) as writer:
        with pytest.raises(ValueError, match="not the next tensor"):
            writer.write("a", [])
        with pytest.raises(ValueError, match="takes 16 bytes, not 8"):
            writer.write("d", [b"12345678"])
        with pytest.raises(ValueError, match="never written"):
            writer.digest()


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileAccessError, match="exists"):
        written(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_order_keeps_every_payload_aligned() -> None:
    slots = [Slot("half", "F16", (3,)), Slot("long", "I64", (1,)), Slot("byte", "U8", (1,)),
             Slot("half2", "BF16", (1,)), Slot("float", "F32", (1,))]  # fmt: skip
    assert [s.name for s in in_file_order(slots)] == ["long", "float", "half", "half2", "byte"]


def test_pieces_of_any_size_arrive_in_order_and_are_hashed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes = [0, 1, PIECE, PIECE + 3, 5, IN_FLIGHT + 7, 2]
    pieces = [random.integers(0, 256, size, np.uint8).tobytes() for size in sizes]
    own = hashlib.sha256()
    with FileWriter(tmp_path / "x", sum(sizes)) as file:
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
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(FileAccessError, match="expected to write 1,000 bytes, found no space left"),
        FileWriter(tmp_path / "x", 1000) as file,
    ):
        for _ in range(100):
            file.put(memoryview(bytes(PIECE)))
    with (
        pytest.raises(FileAccessError, match="no space left"),
        FileWriter(tmp_path / "y", 1) as file,
    ):
        file.put(memoryview(b"x"))
        file.finish()


def test_digests_of_single_tensors(tmp_path: Path) -> None:
    slots = [Slot("a", "F32", (2,)), Slot("b", "F32", (3,))]
    b = np.arange(3, dtype=np.float32)
    with TensorWriter(tmp_path / "x", slots) as writer:
        writer.write("a", [bytes(8)])
        writer.write("b", [b[:1], b[1:]], hashed=True)
        writer.digest()
        assert writer.digests() == {"b": hashlib.sha256(b.tobytes()).hexdigest()}
