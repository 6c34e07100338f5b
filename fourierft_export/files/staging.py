"""Outputs that are absent or complete, never half there.

Work goes to a sibling folder, `OUT.partial-<plan>`, and its result is renamed to OUT at the end.
The folder is locked while a process works in it. One that is not locked was left by a killed
process: a run of the same plan uses it, any other run for the same OUT removes it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FileAccessError, UsageError
from .external import find_external_files
from .links import find_real_paths
from .locks import try_lock, unlock
from .write import set_umask_mode, sync

_PARTIAL = ".partial-"
_LOCK = ".lock"
_OLD = ".old"
_ATTEMPTS = 5


def check_output(
    out: str | os.PathLike[str], *, force: bool, inputs: tuple[str | os.PathLike[str], ...] = ()
) -> Path:
    """Refuse an output that exists (without `force`), would damage an input, or lies in no folder.

    Args:
        out: the file or folder to write.
        force: whether an existing output may be replaced.
        inputs: files and folders that are read. Even with `force`, `out` may not be one of them,
            nor a folder that holds one, nor lie inside such a folder. The same goes for what the
            links in such a folder lead to, and for the external data of an ONNX file.

    Raises:
        UsageError: the output exists; it is an input, holds one, or lies inside one.
        FileAccessError: the folder it should lie in is missing.
    """
    path = Path(out)
    for named in (f"{os.fspath(out)}{_PARTIAL}{'x' * 16}" if os.fspath(out) else out, *inputs):
        _refuse_impossible(os.fspath(named))
    real = Path(os.path.realpath(path))
    for source in inputs:
        data = find_external_files(source) if os.path.lexists(path) else ()
        for origin in (*find_real_paths(source), *data):
            if real == origin or real in origin.parents or origin in real.parents:
                where = "a place inside " if origin in real.parents else ""
                raise UsageError(
                    path,
                    expected="an output apart from the inputs",
                    found=f"{where}the input {source}",
                    remedy="choose another output",
                )
    if os.path.lexists(path) and not force:
        clean_leftovers(path)  # of a run that was killed after it had finished
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


def _refuse_impossible(path: str) -> None:
    """Raise if no file can have this path: it is empty, too long, or has a NUL in it."""
    found = "" if path else "an empty path"
    try:
        os.lstat(path)
    except ValueError:
        found = "a NUL in the path"
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            found = f"a path of {len(path)} characters, too long for the system"
    if found:
        shown = path if len(path) < 80 else f"{path[:80]}..."
        raise UsageError(shown or "path", expected="the path of a file or folder", found=found)


@contextmanager
def open_work_folder(
    out: str | os.PathLike[str], *, plan: str | None = None, keep: bool = False
) -> Iterator[Path]:
    """Make and lock a folder next to `out`; it is removed when the block ends, but for a kill.

    Args:
        out: the output.
        plan: a short hash of the work, for the folder's name; the process id by default.
        keep: leave the files of a killed process with the same plan in it.

    Raises:
        FileAccessError: another process works in this folder; it cannot be made.
    """
    path = Path(out)
    folder = path.with_name(f"{path.name}{_PARTIAL}{plan or os.getpid()}")
    with name_os_errors(path, folder):
        lock = _take(folder)
    try:
        with name_os_errors(path, folder):
            clean_leftovers(path, folder)
            if not keep:
                _empty(folder)
        yield folder
    finally:
        _leave(folder, lock, path)


@contextmanager
def staged_file(out: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a path to write to; it is renamed to `out`, or removed if the block raises."""
    with _staged(out, force) as staged:
        yield staged
        set_umask_mode(staged)


@contextmanager
def staged_directory(out: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it is renamed to `out`, or removed if the block raises."""
    with _staged(out, force) as staged:
        staged.mkdir()
        yield staged
        for file in staged.rglob("*"):
            if not file.is_symlink():
                sync(file)


@contextmanager
def _staged(out: str | os.PathLike[str], force: bool) -> Iterator[Path]:
    path = check_output(out, force=force)
    with open_work_folder(path) as folder, name_os_errors(path, folder):
        staged = folder / path.name
        yield staged
        sync(staged)
        publish(staged, path, force=force)


def publish(staged: Path, out: Path, *, force: bool) -> None:
    """Rename a complete, flushed file or folder to its place.

    `staged` lies in a `open_work_folder` of `out`, which keeps what is replaced until the end.

    Raises:
        UsageError: another process has made `out` meanwhile, and `force` is not set.
        OSError: it cannot be renamed.
    """
    old = staged.with_name(_OLD)
    for _ in range(_ATTEMPTS):
        by_one_rename = staged.is_file() and (out.is_symlink() or not out.is_dir())
        if not os.path.lexists(out) or (force and by_one_rename):
            try:
                _move(staged, out, force=force)
            except OSError as error:
                # Another writer was faster: its output is replaced, or stays.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            else:
                sync(out.parent)
                return
        if not force:
            break
        _remove(old)
        with contextlib.suppress(FileNotFoundError):
            os.replace(out, old)
    raise UsageError(
        out,
        expected="an output that no other process writes",
        found="one that appeared meanwhile",
        remedy="choose another output, or pass --force (force=True) to replace it",
    )


def _move(staged: Path, out: Path, *, force: bool) -> None:
    """Rename; without `force`, a file does not replace one that has appeared (folders never do)."""
    if force or not staged.is_file() or os.name == "nt":
        (os.replace if force else os.rename)(staged, out)
        return
    try:
        os.link(staged, out)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.rename(staged, out)
    else:
        staged.unlink()


def _take(folder: Path) -> int:
    """Make and lock a work folder."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = try_lock(folder / _LOCK)
        except FileNotFoundError:  # its last user has just removed it
            continue
        if lock is None:
            raise FileAccessError(
                folder,
                expected="an output that no other process is writing",
                found="another process at work",
                remedy="wait for it, or stop it and run again",
            )
        return lock


def clean_leftovers(out: Path, own: Path | None = None) -> None:
    """Remove the work folders of `out`, all but `own`, that killed processes have left."""
    for folder in out.parent.glob(f"{glob.escape(out.name)}{_PARTIAL}*"):
        if folder == own or folder.is_symlink() or not folder.is_dir():
            continue
        if not (folder / _LOCK).exists():
            with contextlib.suppress(OSError):  # only if empty: killed before it was locked
                folder.rmdir()
            continue
        with contextlib.suppress(OSError):
            lock = try_lock(folder / _LOCK)
            if lock is not None:
                _leave(folder, lock, out)


def _leave(folder: Path, lock: int, out: Path) -> None:
    """Remove a work folder; what was moved aside and not replaced goes back."""
    if os.path.lexists(folder / _OLD) and not os.path.lexists(out):
        os.replace(folder / _OLD, out)
    _empty(folder)
    unlock(lock, folder / _LOCK)
    with contextlib.suppress(OSError):  # another process is about to lock it
        folder.rmdir()


def _empty(folder: Path) -> None:
    """Remove everything in a work folder but its lock."""
    for entry in os.scandir(folder):
        if entry.name != _LOCK:
            _remove(Path(entry))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
