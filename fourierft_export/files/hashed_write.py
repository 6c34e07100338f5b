"""Writes a new file from pieces, hashed on the way, and what finished files need.

Reading, hashing and writing take about the same time, and all of them let go of the interpreter
lock: in turn they would take three times as long as the slowest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileAccessError

Buffer = bytes | bytearray | memoryview | np.ndarray
PIECE = 2 << 20
IN_FLIGHT = 16 << 20
FLUSH_EVERY = 64 << 20

_flush = getattr(os, "fdatasync", os.fsync)


def write_file(path: Path, pieces: Iterable[Buffer]) -> str:
    """Write a file that does not exist yet, flush it to the disk, and return its sha256 in hex.

    One thread writes, one hashes, and one flushes what has been written, so that the disk works
    from the start and not only at the end. Pieces may not change after they were yielded.
    """
    digest, unflushed = hashlib.sha256(), 0
    pending: deque[Future[Any]] = deque()
    with open(path, "xb", buffering=0) as file, ExitStack() as stack:
        writer, hasher, flusher = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        flushing: Future[Any] = flusher.submit(int)
        for view in map(view_bytes, pieces):
            for at in range(0, len(view), PIECE):
                part = view[at : at + PIECE]
                pending.append(writer.submit(_write_all, file.fileno(), part))
                pending.append(hasher.submit(digest.update, part))
                while len(pending) > 2 * IN_FLIGHT // PIECE:
                    pending.popleft().result()
                unflushed += len(part)
                if unflushed >= FLUSH_EVERY and flushing.done():
                    unflushed, flushing = 0, flusher.submit(_flush, file.fileno())
        for future in (*pending, flushing):
            future.result()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_all(fd: int, view: memoryview) -> None:
    """Write all of `view`; a single call may write less (and stops at 2 GiB)."""
    while len(view):
        view = view[os.write(fd, view) :]


def view_bytes(piece: Buffer) -> memoryview:
    """View the bytes of a buffer or array (made C-contiguous and little-endian)."""
    if isinstance(piece, np.ndarray):
        little = np.ascontiguousarray(piece, dtype=piece.dtype.newbyteorder("<"))
        return little.reshape(-1).view(np.uint8).data.cast("B")
    return memoryview(piece).cast("B")


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


@contextmanager
def name_os_errors(path: Path, work: Path, nbytes: int = 0) -> Iterator[None]:
    """Turn an `OSError` of the block into a `FileAccessError` that names the file.

    It names the output `path`, which needs `nbytes` bytes (0: not known), for errors without a
    file name and for those at the output and in its work folder `work`.
    """
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error.filename, (str, os.PathLike)) and not full:
            named, folder = (Path(os.path.abspath(one)) for one in (error.filename, work))
            output = Path(os.path.abspath(path))
            if named not in (output, output.parent) and folder not in (named, *named.parents):
                raise FileAccessError(
                    error.filename, expected="a readable file", found=found
                ) from error
        raise FileAccessError(
            path,
            expected=f"to write all of its {nbytes:,} bytes"
            if nbytes
            else "to be able to write it",
            found="no space left" if full else found,
            remedy="free some space and run again; nothing was written" if full else "",
        ) from error
