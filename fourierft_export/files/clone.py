"""A copy of a file that shares its blocks, on file systems that can (btrfs, xfs, bcachefs)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h


def try_clone(source: Path, target: Path) -> bool:
    """Make `target`, a new file, a clone of `source`; False where that cannot be done.

    Its mode follows the umask. It is not flushed.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    from_fd = os.open(source, os.O_RDONLY)
    try:
        to_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.ioctl(to_fd, _FICLONE, from_fd)
        except OSError:  # another file system, or one that shares no blocks
            target.unlink()
            return False
        finally:
            os.close(to_fd)
    except OSError:
        return False
    finally:
        os.close(from_fd)
    return True
