"""The writer of files: every piece in order, hashed, and errors of its threads."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from fourierft_export.files.hashed_write import IN_FLIGHT, PIECE, write_file


def test_pieces_of_any_size_arrive_in_order_and_are_hashed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes = [0, 1, PIECE, PIECE + 3, 5, IN_FLIGHT + 7, 2]
    pieces = [random.integers(0, 256, size, np.uint8).tobytes() for size in sizes]
    big_endian = np.arange(6, dtype=">f4").reshape(3, 2).T  # and not contiguous
    digest = write_file(tmp_path / "x", (*pieces, big_endian, bytearray(b"end")))
    expected = b"".join(pieces) + big_endian.astype("<f4").tobytes() + b"end"
    assert (tmp_path / "x").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "x", [b"an existing file must not be opened"])


@pytest.mark.parametrize("count", [1, 100])
def test_an_error_of_its_threads_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    def full(fd: int, data: memoryview) -> int:
        raise OSError("full")

    monkeypatch.setattr(os, "write", full)
    yielded = []
    pieces = (yielded.append(number) or bytes(PIECE) for number in range(count))  # type: ignore[func-returns-value]
    with pytest.raises(OSError, match="full"):
        write_file(tmp_path / "x", pieces)
    assert len(yielded) <= 2 + IN_FLIGHT // PIECE
