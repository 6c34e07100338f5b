"""One new file, written and hashed by two threads while the caller makes the next piece.

Reading, hashing and writing take about the same time, and all of them let go of the interpreter
lock: in turn they would take three times as long as the slowest. A third thread flushes what has
been written, so that the disk works from the start and not only at the end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

from ..errors import FileAccessError, FourierFTError

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

    Args:
        path: the file to make; it may not exist. Its mode follows the umask.
        size: bytes that are needed, for the message when the disk is full.

    Raises:
        FileAccessError: the file cannot be made or written; the disk is full.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._hash = hashlib.sha256()
        self._error: BaseException | None = None
        self._in_flight = 0
        self._unflushed = 0
        self._changed = threading.Condition()

    def __enter__(self) -> FileWriter:
        try:
            self._file = open(self.path, "xb", buffering=0)
        except OSError as error:
            raise not_writable(self.path, error, self.size) from error
        self._queues: list[SimpleQueue[Any]] = []
        self._threads: list[threading.Thread] = []
        for work in (self._write, self._update, self._flush_some):
            queue: SimpleQueue[Any] = SimpleQueue()
            thread = threading.Thread(target=self._run, args=(queue, work), daemon=True)
            self._queues.append(queue)
            self._threads.append(thread)
            thread.start()
        return self

    def put(self, data: memoryview, also: Hash | None = None) -> int:
        """Append bytes, which must not change afterwards; returns their number.

        Args:
            data: of any length.
            also: a hash to update with them.

        Raises:
            FileAccessError: of an earlier piece.
        """
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            with self._changed:
                self._changed.wait_for(partial(self._has_room, len(piece)))
                self._raise_error()
                self._in_flight += len(piece)
            parts = [piece, also, 2]  # taken by two threads
            self._queues[0].put(parts)
            self._queues[1].put(parts)
        return len(data)

    def finish(self) -> str:
        """Wait until everything is written and on the disk; returns the file's sha256 in hex.

        Raises:
            FileAccessError: it could not be written.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._in_flight)
            self._raise_error()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise not_writable(self.path, error, self.size) from error
        return self._hash.hexdigest()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            with self._changed:
                self._error = self._error or error
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        self._file.close()

    def _has_room(self, size: int) -> bool:
        room = not self._in_flight or self._in_flight + size <= IN_FLIGHT
        return room or self._error is not None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, queue: SimpleQueue[Any], work: Callable[[Any], None]) -> None:
        while (item := queue.get()) is not None:
            if self._error is None:  # after an error, only make room for whoever waits
                try:
                    work(item)
                except (FourierFTError, OSError, MemoryError) as error:
                    with self._changed:
                        self._error = error
                        self._changed.notify_all()

    def _write(self, item: list[Any]) -> None:
        write_all(self._file.fileno(), item[0], self.path, self.size)
        self._unflushed += len(item[0])
        if self._unflushed >= FLUSH_EVERY and self._queues[2].empty():
            self._unflushed = 0
            self._queues[2].put(True)
        self._done(item)

    def _update(self, item: list[Any]) -> None:
        piece, also, _ = item
        self._hash.update(piece)
        if also is not None:
            also.update(piece)
        self._done(item)

    def _done(self, item: list[Any]) -> None:
        with self._changed:
            item[2] -= 1
            if item[2] == 0:
                self._in_flight -= len(item[0])
                self._changed.notify_all()

    def _flush_some(self, _: bool) -> None:
        try:
            _flush(self._file.fileno())
        except OSError as error:
            raise not_writable(self.path, error, self.size) from error


def write_all(fd: int, view: memoryview, path: Path, size: int) -> None:
    """Write all of `view`; a single call may write less (and stops at 2 GiB).

    Raises:
        FileAccessError: naming `path` and the `size` bytes that it needs.
    """
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
