"""Outputs that are absent or complete, never half there.

Work goes to a sibling, `OUT.partial-<plan>`, and is renamed at the end (`os.replace`), so a killed
process leaves the sibling and the next run with the same plan takes it over.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FileAccessError, UsageError


def check_output(
    out: str | os.PathLike[str], *, force: bool, inputs: tuple[str | os.PathLike[str], ...] = ()
) -> Path:
    """Refuse an output that exists (without `force`), is an input, or lies in no folder.

    Args:
        out: where the result shall be.
        force: whether an existing output may be replaced.
        inputs: paths that are read; `out` may not be one of them, nor hold one, even through links.

    Raises:
        UsageError: the output exists, or is an input.
        FileAccessError: the folder it should lie in is missing.
    """
    path = Path(out)
    real = Path(os.path.realpath(path))
    for source in inputs:
        origin = Path(os.path.realpath(source))
        if real == origin or real in origin.parents:
            raise UsageError(
                path,
                expected="an output apart from the inputs",
                found=f"the input {source}",
                remedy="choose another output",
            )
    if os.path.lexists(path) and not force:
        raise UsageError(
            path,
            expected="an output that does not exist yet",
            found="one that does",
            remedy="choose another, or pass --force (force=True) to replace it",
        )
    if os.path.lexists(path) and not path.is_symlink() and not path.is_file() and not path.is_dir():
        # `--force -o /dev/null` must not replace the device for everybody on the machine.
        raise UsageError(
            path,
            expected="an output that is a file or a folder",
            found="a FIFO, device or socket",
            remedy="choose another output",
        )
    if not path.parent.is_dir():
        raise FileAccessError(
            path.parent, expected="a folder to write to", found="none", remedy="make it first"
        )
    return path


@contextmanager
def staged_file(out: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A path to write to; it becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        UsageError, FileAccessError: as `check_output`; FileAccessError also for a full disk.
    """
    path = check_output(out, force=force)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with os_errors_named(path):
            yield partial
            set_umask_mode(partial)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staged_directory(
    out: str | os.PathLike[str], *, plan: str | None = None, force: bool = False
) -> Iterator[Path]:
    """An empty folder to fill; it becomes `out` when the block ends well, and vanishes otherwise.

    Args:
        out: the folder to make.
        plan: a short hash of what is being done; names the sibling. The process id by default.
        force: replace an existing folder. It is moved aside first and removed last.

    Raises:
        UsageError, FileAccessError: as `check_output`; FileAccessError also for a full disk.
    """
    path = check_output(out, force=force)
    partial = path.with_name(f"{path.name}.partial-{plan or os.getpid()}")
    old = path.with_name(f"{path.name}.old-{os.getpid()}")
    try:
        with os_errors_named(path):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            yield partial
            for file in partial.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    sync(file)
            if os.path.lexists(path):
                os.replace(path, old)
            os.replace(partial, path)
            sync(path.parent)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


@contextmanager
def os_errors_named(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `FileAccessError` that names the output."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise FileAccessError(
            path,
            expected="to be able to write it",
            found="no space left" if full else (error.strerror or str(error)),
            remedy="free space and run it again; nothing was written" if full else "",
        ) from error


def set_umask_mode(path: Path) -> None:
    """Give a file the mode the umask asks for; several libraries write 0600."""
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
