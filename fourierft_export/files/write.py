"""A safetensors file written front to back: the header first, then one payload after another.

The `safetensors` library wants all tensors in memory before it writes the first byte; a merge
holds one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from ..errors import FileAccessError
from .container import DTYPE_BITS, encode_header
from .pipe import FileWriter, Hash

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
        self._hashes: dict[str, Hash] = {}
        self.size = len(self._header) + sum(slot.nbytes for slot in self.slots)
        self._file = FileWriter(path, self.size)

    def __enter__(self) -> TensorWriter:
        self._file.__enter__()
        self._file.put(memoryview(self._header))
        return self

    def write(self, name: str, pieces: Iterable[Buffer], *, hashed: bool = False) -> None:
        """Append the payload of the next tensor.

        Args:
            name: the tensor's name; it must be the next slot's.
            pieces: its bytes, little-endian, in C order; they must not change afterwards.
            hashed: also take the sha256 of this payload (`digests`).

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
        """The sha256 of the whole file, in hex, once it is on the disk.

        Raises:
            ValueError: a tensor has not been written yet.
            FileAccessError: the disk is full, or gone.
        """
        if self._next != len(self.slots):
            raise ValueError(f"{self.path}: {self.slots[self._next].name!r} was never written")
        return self._file.finish()

    def digests(self) -> dict[str, str]:
        """The sha256 of each payload that was written with `hashed`; after `digest`."""
        return {name: own.hexdigest() for name, own in self._hashes.items()}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)


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
    with FileWriter(target, size) as file:
        for piece in pieces:
            file.put(memoryview(piece))
        return file.finish()


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
