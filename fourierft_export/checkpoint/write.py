"""A safetensors file written front to back: the header first, then one payload after another.

The `safetensors` library wants all tensors in memory before it writes the first byte; a merge
holds one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from ..errors import FileAccessError
from .container import DTYPE_BITS, encode_header

Buffer = bytes | bytearray | memoryview | np.ndarray


class Slot(NamedTuple):
    """A tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its payload in bytes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def in_file_order(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    """`slots` with the widest elements first, otherwise in their order.

    Readers view the payload in place, which needs every tensor aligned to its element size; the
    `safetensors` library writes in this order too.
    """
    return tuple(sorted(slots, key=lambda slot: -DTYPE_BITS[slot.dtype]))


class TensorWriter:
    """Writes one safetensors file in a stream; a context manager.

    Args:
        path: the file to make; it may not exist. Its mode follows the umask.
        slots: what will be written, in this order.
        metadata: the file's `__metadata__`.

    Raises:
        FileAccessError: the file cannot be made or written; the disk is full.
    """

    def __init__(
        self, path: Path, slots: Iterable[Slot], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.slots = tuple(slots)
        self._header = encode_header(self.slots, metadata)
        self._next = 0
        self._hash = hashlib.sha256()
        self.size = len(self._header) + sum(slot.nbytes for slot in self.slots)

    def __enter__(self) -> TensorWriter:
        try:
            self._file = open(self.path, "xb", buffering=0)
        except OSError as error:
            raise _not_writable(self.path, error, self.size) from error
        self._put(self._header)
        return self

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Append the payload of the next tensor.

        Args:
            name: the tensor's name; it must be the next slot's.
            pieces: its bytes, little-endian, in C order.

        Raises:
            ValueError: not the next tensor, or not its number of bytes.
            FileAccessError: the disk is full, or gone.
        """
        slot = self.slots[self._next] if self._next < len(self.slots) else None
        if slot is None or slot.name != name:
            raise ValueError(f"{self.path}: {name!r} is not the next tensor to write ({slot})")
        done = sum(self._put(piece) for piece in pieces)
        if done != slot.nbytes:
            raise ValueError(f"{self.path}: {name!r} takes {slot.nbytes} bytes, not {done}")
        self._next += 1

    def digest(self) -> str:
        """The sha256 of the whole file, in hex.

        Raises:
            ValueError: a tensor has not been written yet.
        """
        if self._next != len(self.slots):
            raise ValueError(f"{self.path}: {self.slots[self._next].name!r} was never written")
        return self._hash.hexdigest()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _put(self, piece: Buffer) -> int:
        """Write and hash one buffer; returns its number of bytes."""
        view = as_bytes(piece)
        self._hash.update(view)
        write_all(self._file.fileno(), view, self.path, self.size)
        return len(view)


def as_bytes(piece: Buffer) -> memoryview:
    """The bytes of a buffer or array (made C-contiguous and little-endian), as a flat view."""
    if isinstance(piece, np.ndarray):
        little = np.ascontiguousarray(piece, dtype=piece.dtype.newbyteorder("<"))
        return little.reshape(-1).view(np.uint8).data.cast("B")
    return memoryview(piece).cast("B")


def copy_file(target: Path, pieces: Iterable[bytes], size: int) -> str:
    """Write a new file from its pieces; returns its sha256 in hex.

    Args:
        target: the file to make; it may not exist. Its mode follows the umask.
        pieces: its content.
        size: bytes that are needed, for the message when the disk is full.

    Raises:
        FileAccessError: it cannot be written.
    """
    digest = hashlib.sha256()
    try:
        with open(target, "xb", buffering=0) as file:
            for piece in pieces:
                digest.update(piece)
                write_all(file.fileno(), memoryview(piece), target, size)
    except OSError as error:
        raise _not_writable(target, error, size) from error
    return digest.hexdigest()


def write_all(fd: int, view: memoryview, path: Path, size: int) -> None:
    """Write all of `view`; a single call may write less (and stops at 2 GiB).

    Raises:
        FileAccessError: naming `path` and the `size` bytes that it needs.
    """
    try:
        while len(view):
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise _not_writable(path, error, size) from error


def check_space(directory: Path, needed: int) -> None:
    """Refuse work that cannot fit on the disk, before any of it is done.

    Args:
        directory: where it shall be written; it exists.
        needed: bytes.

    Raises:
        FileAccessError: less is free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise FileAccessError(
            directory,
            expected=f"{needed:,} bytes of free space",
            found=f"{free:,} bytes",
            remedy="free some, or write elsewhere",
        )


def _not_writable(path: Path, error: OSError, size: int) -> FileAccessError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return FileAccessError(
        path,
        expected=f"to write {size:,} bytes" if full else "a place to write to",
        found="no space left" if full else (error.strerror or str(error)),
        remedy="free some space and run again; nothing is left behind" if full else "",
    )
