"""Files written front to back, hashed on the way: any file, and safetensors files in a stream.

The `safetensors` library wants all tensors in memory before it writes the first byte; a merge
holds one. Reading, hashing and writing take about the same time, and all of them let go of the
interpreter lock: in turn they would take three times as long as the slowest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import FileAccessError
from .container import encode_header
from .dtypes import DTYPE_BITS

Buffer = bytes | bytearray | memoryview | np.ndarray
PIECE = 2 << 20
IN_FLIGHT = 16 << 20
FLUSH_EVERY = 64 << 20

_flush = getattr(os, "fdatasync", os.fsync)


class Hash(Protocol):
    """What `hashlib.sha256()` makes."""

    def update(self, data: memoryview, /) -> None: ...  # noqa: D102

    def hexdigest(self) -> str: ...  # noqa: D102


class FileWriter:
    """Writes one new file of `size` bytes front to back and hashes it; a context manager.

    One thread writes, one hashes, and one flushes what has been written, so that the disk works
    from the start and not only at the end. The file may not exist; its mode follows the umask.

    Raises:
        FileAccessError: the file cannot be made or written; the disk is full.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._hash = hashlib.sha256()
        self._unflushed = 0
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._flushing: Future[None] | None = None

    def __enter__(self) -> FileWriter:
        try:
            self._file = open(self.path, "xb", buffering=0)
        except OSError as error:
            raise not_writable(self.path, error, self.size) from error
        self._threads = [ThreadPoolExecutor(1) for _ in range(3)]
        return self

    def put(self, data: memoryview, also: Hash | None = None) -> int:
        """Append bytes, which must not change afterwards, and update `also`; returns their number.

        Raises the error of an earlier piece.
        """
        writer, hasher, flusher = self._threads
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            while len(self._pending) >= IN_FLIGHT // PIECE:
                self._wait()
            written = writer.submit(write_all, self._file.fileno(), piece, self.path, self.size)
            self._pending.append((written, hasher.submit(self._update, piece, also)))
            self._unflushed += len(piece)
            if self._unflushed >= FLUSH_EVERY and (not self._flushing or self._flushing.done()):
                self._unflushed = 0
                self._flushing = flusher.submit(_flush, self._file.fileno())
        return len(data)

    def finish(self) -> str:
        """Wait until everything is written and on the disk; returns the file's sha256 in hex."""
        while self._pending:
            self._wait()
        try:
            if self._flushing:
                self._flushing.result()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise not_writable(self.path, error, self.size) from error
        return self._hash.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=kind is not None)
        self._file.close()

    def _update(self, piece: memoryview, also: Hash | None) -> None:
        self._hash.update(piece)
        if also is not None:
            also.update(piece)

    def _wait(self) -> None:
        for future in self._pending.popleft():
            future.result()


def write_all(fd: int, view: memoryview, path: Path, size: int) -> None:
    """Write all of `view`; a single call may write less (and stops at 2 GiB)."""
    try:
        while len(view):
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise not_writable(path, error, size) from error


def not_writable(path: Path, error: OSError, size: int) -> FileAccessError:
    """The error for a file of `size` bytes that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return FileAccessError(
        path,
        expected=f"to write {size:,} bytes" if full else "a place to write to",
        found="no space left" if full else (error.strerror or str(error)),
        remedy="free some space and run again; nothing is left behind" if full else "",
    )


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
    """Writes one safetensors file, with `slots` in this order, in a stream; a context manager."""

    def __init__(
        self, path: Path, slots: Iterable[Slot], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.slots = tuple(slots)
        self._header = encode_header(self.slots, metadata)
        self._next = 0
        self._hashes: dict[str, Hash] = {}
        self.size = len(self._header) + sum(slot.nbytes for slot in self.slots)
        self._file = FileWriter(path, self.size)

    def __enter__(self) -> TensorWriter:
        self._file.__enter__()
        self._file.put(memoryview(self._header))
        return self

    def write(self, name: str, pieces: Iterable[Buffer], *, hashed: bool = False) -> None:
        """Append the payload of the next tensor; `hashed` also takes its sha256 (`digests`).

        `pieces` are its bytes, little-endian, in C order; they must not change afterwards.

        Raises:
            ValueError: not the next tensor, or not its number of bytes.
            FileAccessError: the disk is full, or gone.
        """
        slot = self.slots[self._next] if self._next < len(self.slots) else None
        if slot is None or slot.name != name:
            raise ValueError(f"{self.path}: {name!r} is not the next tensor to write ({slot})")
        own = self._hashes.setdefault(name, hashlib.sha256()) if hashed else None
        done = sum(self._file.put(as_bytes(piece), own) for piece in pieces)
        if done != slot.nbytes:
            raise ValueError(f"{self.path}: {name!r} takes {slot.nbytes} bytes, not {done}")
        self._next += 1

    def digest(self) -> str:
        """The sha256 of the whole file, in hex, once it is on the disk."""
        if self._next != len(self.slots):
            raise ValueError(f"{self.path}: {self.slots[self._next].name!r} was never written")
        return self._file.finish()

    def digests(self) -> dict[str, str]:
        """The sha256 of each payload that was written with `hashed`; after `digest`."""
        return {name: own.hexdigest() for name, own in self._hashes.items()}

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def as_bytes(piece: Buffer) -> memoryview:
    """The bytes of a buffer or array (made C-contiguous and little-endian), as a flat view."""
    if isinstance(piece, np.ndarray):
        little = np.ascontiguousarray(piece, dtype=piece.dtype.newbyteorder("<"))
        return little.reshape(-1).view(np.uint8).data.cast("B")
    return memoryview(piece).cast("B")


def copy_file(target: Path, pieces: Iterable[bytes], size: int) -> str:
    """Write a new file of `size` bytes from its pieces; returns its sha256 in hex."""
    with FileWriter(target, size) as file:
        for piece in pieces:
            file.put(memoryview(piece))
        return file.finish()


def check_space(directory: Path, needed: int) -> None:
    """Refuse work that needs more bytes than are free on the disk of `directory`."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise FileAccessError(
            directory,
            expected=f"{needed:,} bytes of free space",
            found=f"{free:,} bytes",
            remedy="free some, or write elsewhere",
        )
