"""A lock on a file that dies with its holder: no stale locks after a kill.

`flock` where there is one, a locked byte on Windows. It keeps processes of one machine apart, and
those of several where the shared file system passes locks on (NFS does).
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def try_lock(path: Path) -> int | None:
    """Lock the file at `path`, which is made if it is absent.

    Returns an open descriptor, for `unlock`; None while another process holds the lock.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(fd):
                os.close(fd)
                return None
            # Its last holder may have removed the file before letting go: then this lock is void.
            same = os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            same = False
        except BaseException:
            os.close(fd)
            raise
        if same:
            return fd
        os.close(fd)


def unlock(fd: int, path: Path) -> None:
    """Let go of a lock of `try_lock` and remove its file."""
    if os.name == "nt":  # where an open file cannot be removed
        os.close(fd)
        path.unlink(missing_ok=True)
        return
    path.unlink(missing_ok=True)
    os.close(fd)


if sys.platform == "win32":
    import msvcrt

    def _lock(fd: int) -> bool:
        with contextlib.suppress(OSError):
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            return True
        return False
else:
    import fcntl

    def _lock(fd: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False
