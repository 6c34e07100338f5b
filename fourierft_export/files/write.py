"""Files written front to back, hashed on the way: any file, and safetensors files in a stream.

The `safetensors` library wants all tensors in memory before it writes the first byte; a merge
holds one. Reading, hashing and writing take about the same time, and all of them let go of the
interpreter lock: in turn they would take three times as long as the slowest.
"""

from __future__ import annotations

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
    """Writes one new file front to back and hashes it; a context manager.

    One thread writes, one hashes, and one flushes what has been written, so that the disk works
    from the start and not only at the end. The file may not exist; its mode follows the umask.

    Raises:
        OSError: the file cannot be made or written; the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._unflushed = 0
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._flushing: Future[None] | None = None

    def __enter__(self) -> FileWriter:
        self._file = open(self.path, "xb", buffering=0)
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
            written = writer.submit(_write_all, self._file.fileno(), piece)
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
        if self._flushing:
            self._flushing.result()
        os.fsync(self._file.fileno())
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


def _write_all(fd: int, view: memoryview) -> None:
    """Write all of `view`; a single call may write less (and stops at 2 GiB)."""
    while len(view):
        view = view[os.write(fd, view) :]


class Slot(NamedTuple):
    """A tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its payload in bytes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def sort_slots(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    """Sort `slots`: those with the widest elements first, otherwise in their order.

    Readers view the payload in place, which needs every tensor aligned to its element size; the
    `safetensors` library writes in this order too.
    """
    return tuple(sorted(slots, key=lambda slot: -DTYPE_BITS[slot.dtype]))


class TensorWriter:
    """Writes one safetensors file, with `slots` in this order, in a stream; a context manager.

    Attributes:
        size: of the whole file, in bytes.
    """

    def __init__(
        self, path: Path, slots: Iterable[Slot], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._left = deque(slots)
        self._header = encode_header(self._left, metadata)
        self.size = len(self._header) + sum(slot.nbytes for slot in self._left)
        self._file = FileWriter(path)

    def __enter__(self) -> TensorWriter:
        self._file.__enter__()
        self._file.put(memoryview(self._header))
        return self

    def write(self, pieces: Iterable[Buffer], digest: Hash | None = None) -> None:
        """Append the payload of the next tensor.

        Args:
            pieces: its bytes, little-endian, in C order; they must not change afterwards.
            digest: is updated with them; complete after `finish`.

        Raises:
            ValueError: no tensor is left, or not its number of bytes.
            OSError: the disk is full, or gone.
        """
        if not self._left:
            raise ValueError("all tensors are written")
        slot = self._left.popleft()
        done = sum(self._file.put(view_bytes(piece), digest) for piece in pieces)
        if done != slot.nbytes:
            raise ValueError(f"{slot.name!r} takes {slot.nbytes} bytes, not {done}")

    def finish(self) -> str:
        """Wait until the file is on the disk; returns its sha256 in hex."""
        if self._left:
            raise ValueError(f"{self._left[0].name!r} was never written")
        return self._file.finish()

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def view_bytes(piece: Buffer) -> memoryview:
    """View the bytes of a buffer or array (made C-contiguous and little-endian)."""
    if isinstance(piece, np.ndarray):
        little = np.ascontiguousarray(piece, dtype=piece.dtype.newbyteorder("<"))
        return little.reshape(-1).view(np.uint8).data.cast("B")
    return memoryview(piece).cast("B")


def copy_file(target: Path, pieces: Iterable[bytes]) -> str:
    """Write a new file from its pieces; returns its sha256 in hex."""
    with FileWriter(target) as file:
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


def set_umask_mode(path: Path) -> None:
    """Give a file the mode that the umask says; several libraries write 0600."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries where the system can, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
