"""Outputs that are absent or complete, never half there.

Work goes to a sibling folder, `OUT.partial-<plan>`, and its result is renamed to OUT at the end.
The folder is locked while a process works in it; the lock dies with its holder. A folder that is
not locked was left by a killed process: a run of the same plan uses it, any other run for the same
OUT removes it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..errors import FileAccessError, UsageError
from .hashed_write import name_os_errors, set_umask_mode, sync
from .onnx_external_data import find_external_files
from .safe_paths import check_path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_PARTIAL = ".partial-"
_LOCK = ".lock"
_OLD = ".old"
_MOVED = ".moved"
_ATTEMPTS = 5


def check_output(
    out: str | os.PathLike[str], *, force: bool, inputs: Iterable[object] = ()
) -> Path:
    """Refuse an output that exists (without `force`), would damage an input, or lies in no folder.

    Even with `force`, `out` may not be one of the `inputs`, files and folders that are read, nor a
    folder that holds one, nor lie inside such a folder. The same goes for what the links in such a
    folder lead to, and for the external data of an ONNX file. Inputs that are no paths are skipped.
    """
    path = Path(out)
    paths = [source for source in inputs if isinstance(source, (str, os.PathLike))]
    for named in (f"{os.fspath(out)}{_PARTIAL}{'x' * 16}" if os.fspath(out) else out, *paths):
        check_path(named)
    real, there = Path(os.path.realpath(path)), os.path.lexists(path)
    for source in paths:
        if not os.path.lexists(source):  # POOL#NAME reads POOL
            source = os.fspath(source).rpartition("#")[0] or source
        for origin in (*_real_paths(source), *(find_external_files(source) if there else ())):
            if real == origin or real in origin.parents or origin in real.parents:
                where = "a place inside " if origin in real.parents else ""
                raise UsageError(
                    path,
                    expected="an output apart from the inputs",
                    found=f"{where}the input {source}",
                    remedy="choose another output",
                )
    if there and not force:
        clean_leftovers(path)  # of a run that was killed after it had finished
        raise UsageError(
            path,
            expected="an output that does not exist yet",
            found="one that does",
            remedy="choose another, or pass --force (force=True) to replace it",
        )
    if there and not (path.is_symlink() or path.is_file() or path.is_dir()):
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


def _real_paths(source: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield where a file or folder really lies, and where every link below it leads."""
    yield Path(os.path.realpath(source))
    for folder, subfolders, files in os.walk(source):
        paths = (os.path.join(folder, name) for name in (*subfolders, *files))
        yield from (Path(os.path.realpath(path)) for path in paths if os.path.islink(path))


@contextmanager
def open_work_folder(
    out: str | os.PathLike[str], *, plan: str | None = None, keep: bool = False
) -> Iterator[Path]:
    """Make and lock a folder next to `out`; it is removed when the block ends, but for a kill.

    Args:
        out: the output.
        plan: a short hash of the work, for the folder's name; the process id by default.
        keep: leave the files of a killed process with the same plan in it.
    """
    path = Path(out)
    folder = path.with_name(f"{path.name}{_PARTIAL}{plan or os.getpid()}")
    with name_os_errors(path, folder):
        lock = None
        while lock is None:  # its last user may remove the folder before it is locked
            folder.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                lock = _try_lock(folder / _LOCK)
    if lock < 0:
        raise FileAccessError(
            folder,
            expected="an output that no other process is writing",
            found="another process at work",
            remedy="wait for it, or stop it and run again",
        )
    try:
        with name_os_errors(path, folder):
            clean_leftovers(path, folder)
            if not keep:
                _restore(folder, path)
                _empty(folder)
        yield folder
    finally:
        _leave(folder, lock, path)


def staged_file(
    out: str | os.PathLike[str], *, force: bool = False
) -> AbstractContextManager[Path]:
    """Yield a path to write to; it is renamed to `out`, or removed if the block raises."""
    return _staged(out, force, is_folder=False)


def staged_directory(
    out: str | os.PathLike[str], *, force: bool = False
) -> AbstractContextManager[Path]:
    """Yield an empty folder to fill; it is renamed to `out`, or removed if the block raises."""
    return _staged(out, force, is_folder=True)


@contextmanager
def _staged(out: str | os.PathLike[str], force: bool, is_folder: bool) -> Iterator[Path]:
    path = check_output(out, force=force)
    with open_work_folder(path) as folder, name_os_errors(path, folder):
        staged = folder / path.name
        if is_folder:
            staged.mkdir()
        yield staged
        if not is_folder:
            set_umask_mode(staged)
        for file in (*staged.rglob("*"), staged):
            if not file.is_symlink():
                sync(file)
        publish(staged, path, force=force)


def publish(staged: Path, out: Path, *, force: bool) -> None:
    """Rename a complete, flushed file or folder, in a work folder of `out`, to its place."""
    for _ in range(_ATTEMPTS):
        if os.path.lexists(out):
            if not force:
                break
            if staged.is_dir() or (out.is_dir() and not out.is_symlink()):
                # No single rename replaces a folder, or something else by a folder.
                remove(staged.with_name(_OLD))
                with contextlib.suppress(FileNotFoundError):
                    os.replace(out, staged.with_name(_OLD))
        try:
            os.replace(staged, out)
        except OSError as error:
            # Another writer was faster: its folder is replaced, or stays.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            sync(out.parent)
            return
    raise UsageError(
        out,
        expected="an output that no other process writes",
        found="one that appeared meanwhile",
        remedy="choose another output, or pass --force (force=True) to replace it",
    )


def publish_together(folder: Path, out: Path) -> tuple[Path, ...]:
    """Move all files of a work folder to their place, `out` first among them and moved last.

    An old `out` is deleted before: it never meets new files, nor the new one old files. Where
    `out` does not come, the other files are removed with the work folder (`_leave`).
    """
    staged = folder / out.name
    more = sorted(file for file in folder.iterdir() if file.name not in (_LOCK, out.name))
    for file in (staged, *more):
        set_umask_mode(file)
        sync(file)
    if more:
        moved = {file.name: _identify(file) for file in more}
        (folder / _MOVED).write_text(json.dumps(moved), "utf-8")
        out.unlink(missing_ok=True)
    for file in more:
        os.replace(file, out.with_name(file.name))
    os.replace(staged, out)
    (folder / _MOVED).unlink(missing_ok=True)
    sync(out.parent)
    return (out, *(out.with_name(file.name) for file in more))


def clean_leftovers(out: Path, own: Path | None = None) -> None:
    """Remove the work folders of `out`, all but `own`, that killed processes have left."""
    for folder in out.parent.glob(f"{glob.escape(out.name)}{_PARTIAL}*"):
        if folder == own or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):
            if not (folder / _LOCK).exists():
                folder.rmdir()  # only if empty: killed before it was locked
            elif (lock := _try_lock(folder / _LOCK)) >= 0:
                _leave(folder, lock, out)


def _try_lock(path: Path) -> int:
    """Lock the file at `path`, made if it is absent; returns its descriptor, -1 if it is locked."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if sys.platform == "win32":
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder may have removed the file before letting go: then this lock is void.
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except (BlockingIOError, PermissionError):
        os.close(fd)
        return -1
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return _try_lock(path)


def _leave(folder: Path, lock: int, out: Path) -> None:
    """Remove a work folder."""
    _restore(folder, out)
    _empty(folder)
    if os.name == "nt":  # where an open file cannot be removed
        os.close(lock)
    (folder / _LOCK).unlink(missing_ok=True)
    if os.name != "nt":
        os.close(lock)
    with contextlib.suppress(OSError):  # another process is about to lock it
        folder.rmdir()


def _restore(folder: Path, out: Path) -> None:
    """Where `out` did not come: put back what was moved aside for it, remove its other files."""
    if os.path.lexists(out):
        return
    if os.path.lexists(folder / _OLD):
        os.replace(folder / _OLD, out)
    with contextlib.suppress(FileNotFoundError, ValueError, AttributeError, TypeError):
        moved: dict[str, list[int]] = json.loads((folder / _MOVED).read_text("utf-8"))
        for name, identity in moved.items():
            with contextlib.suppress(FileNotFoundError):
                if _identify(out.with_name(name)) == identity:  # no file that came later
                    out.with_name(name).unlink()


def _identify(file: Path) -> list[int]:
    """What a renamed file keeps, and no other file has."""
    status = file.lstat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _empty(folder: Path) -> None:
    """Remove everything in a work folder but its lock; somebody may have removed the folder."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            if entry.name != _LOCK:
                remove(Path(entry))


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
