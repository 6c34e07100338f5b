"""The safetensors container, read strictly: where every tensor lies, checked before any is read.

The `safetensors` library accepts duplicate names, and its memory maps end the process (SIGBUS) when
a file shrinks. Headers are therefore parsed here (format: the safetensors README, section Format),
and payloads are read by position.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ..errors import BadInputError, FileAccessError
from . import strict_json
from .dtypes import DTYPE_BITS

MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 2**50
MAX_AXES = 32
PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
_O_EXTRA = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str  # as safetensors calls it: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int  # byte offsets in the file, not in the payload
    stop: int
    path: Path = Path()  # of the file; `Path()` when the container was read from memory

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file."""

    tensors: Mapping[str, TensorInfo]  # in the order of their payloads
    metadata: Mapping[str, str] = field(default_factory=dict)
    size: int = 0  # of the whole file, in bytes
    path: Path = Path()
    stamp: tuple[int, int, int] = (0, 0, 0)  # inode, size and time when it was read


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading, without blocking on a FIFO; returns its descriptor."""
    try:
        fd = os.open(path, os.O_RDONLY | _O_EXTRA)
    except FileNotFoundError:
        raise FileAccessError(path, expected="a file", found="nothing there") from None
    except IsADirectoryError:
        raise BadInputError(path, expected="a file", found="a directory") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        found = getattr(error, "strerror", None) or str(error)
        raise FileAccessError(path, expected="a readable file", found=found) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        kind = "a directory" if os.path.isdir(path) else "a FIFO, device or socket"
        raise BadInputError(path, expected="a regular file", found=kind)
    return fd


def read_exactly(fd: int, start: int, stop: int, where: str | os.PathLike[str]) -> bytes:
    """Read bytes [start, stop) of an open file; BadInputError if it ends before `stop`."""
    pieces = []
    at = start
    while at < stop:
        try:
            piece = _read_at(fd, at, min(stop - at, 1 << 30))
        except OSError as error:
            found = error.strerror or str(error)
            raise FileAccessError(where, expected="a readable file", found=found) from error
        if not piece:
            raise BadInputError(
                where,
                expected=f"at least {stop} bytes",
                found=f"the end of the file at byte {at}",
                remedy="the file is truncated or changed while it was read: get it again",
            )
        pieces.append(piece)
        at += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_at(fd: int, start: int, count: int) -> bytes:
    """Read like `os.pread`, which Windows lacks."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, start)
    os.lseek(fd, start, os.SEEK_SET)
    return os.read(fd, count)


def read_file(path: str | os.PathLike[str], limit: int = MAX_HEADER_BYTES) -> bytes:
    """Read a whole regular file of at most `limit` bytes, such as a config."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise BadInputError(path, expected=f"at most {limit} bytes", found=f"{size}")
        return read_exactly(file.fileno(), 0, size, path)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file."""
    with open(open_regular(path), "rb") as file:
        stamp = read_stamp(file.fileno())
        size = stamp[1]
        head = read_exactly(file.fileno(), 0, min(8, size), path)
        length = decode_header_length(head, size, os.fspath(path))
        text = read_exactly(file.fileno(), 8, 8 + length, path)
    header = parse_header(text, size, os.fspath(path), Path(path))
    return replace(header, path=Path(path), stamp=stamp)


def read_stamp(fd: int) -> tuple[int, int, int]:
    """Read the inode, size and time of an open file, which change when a process writes to it."""
    # Without the device's number, which may differ between machines that share a file system.
    status = os.fstat(fd)
    return status.st_ino, status.st_size, status.st_mtime_ns


def decode_header_length(head: bytes, size: int, where: str) -> int:
    """Decode the length of the JSON header from the first 8 bytes of a file of `size` bytes."""
    length = int.from_bytes(head, "little") if len(head) == 8 else -1
    if 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        return length
    expected, remedy = "a safetensors file", ""
    if not size:
        found = "an empty file"
    elif head.startswith(PICKLE_MAGIC):  # only now: a header of 640 bytes begins like this, too
        found = "a pickle or zip archive, which can run code when it is loaded"
        remedy = "convert it to safetensors with the tool that made it"
    else:
        expected += f" with a header of 2 to {max(size - 8, 2)} bytes"
        found = f"a header length of {length}" if length >= 0 else f"a file of {size} bytes"
        remedy = "the file is truncated or is not safetensors: get it again"
    raise BadInputError(where, expected=expected, found=found, remedy=remedy)


def parse_header(text: bytes, size: int, where: str, path: Path = Path()) -> Header:
    """Check the JSON header `text` of a safetensors file of `size` bytes."""
    entries = strict_json.loads(text, where)
    if not isinstance(entries, dict):
        raise BadInputError(where, expected="a JSON object as header", found=_kind(entries))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadInputError(where, expected="metadata that maps text to text", found="other values")
    at = 8 + len(text)
    tensors = [_tensor(name, entry, at, where, path) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    for tensor in tensors:
        if tensor.start != at:
            raise BadInputError(
                where,
                expected=f"tensor {tensor.name!r} to begin at byte {at}",
                found=f"byte {tensor.start}: tensors overlap or leave a hole",
                remedy="the file is damaged or hostile: get it again",
            )
        at = tensor.stop
    if at != size:
        raise BadInputError(
            where,
            expected=f"{at} bytes, as its header says",
            found=f"{size} bytes",
            remedy="the file is truncated or has trailing bytes: get it again",
        )
    return Header({t.name: t for t in tensors}, metadata, size)


def _tensor(name: str, entry: Any, origin: int, where: str, path: Path) -> TensorInfo:
    """Check one tensor of the header by itself."""

    def fail(expected: str, found: object) -> BadInputError:
        return BadInputError(f"{where}, tensor {name!r}", expected=expected, found=str(found)[:80])

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("exactly dtype, shape and data_offsets", _kind(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail("a known dtype", repr(dtype))
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_size, shape)):
        raise fail(f"a shape of at most {MAX_AXES} whole numbers from 0", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise fail("two byte offsets", offsets)
    # Without the axes of size 0: numpy limits the product of the other axes, too.
    if prod(n for n in shape if n) > MAX_ELEMENTS:
        raise fail(f"at most {MAX_ELEMENTS} elements", f"shape {shape}")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise fail(f"{bits / 8:.0f} bytes for {dtype} {shape}", f"offsets {offsets}")
    return TensorInfo(name, dtype, tuple(shape), origin + offsets[0], origin + offsets[1], path)


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Write the first bytes of a safetensors file with these (name, dtype, shape) in order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        stop = at + prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _kind(value: object) -> str:
    return f"{sorted(value)[:6]}" if isinstance(value, dict) else f"a {type(value).__name__}"
