"""Which paths are possible, and which symbolic links of a downloaded folder are followed.

A link in a downloaded folder can point anywhere on the machine, and a verb that copies what it
reads would copy that. Models in the Hugging Face cache are nothing but links, so those that stay
inside their own cache repository are followed without asking.
"""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import BadInputError, UsageError


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise UsageError if no file can have this path: it is empty, too long, or has a NUL in it."""
    text = os.fspath(path)
    found = "" if text else "an empty path"
    try:
        os.lstat(text)
    except ValueError:
        found = "a NUL in the path"
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            found = f"a path of {len(text)} characters, too long for the system"
    if found:
        shown = text if len(text) < 80 else f"{text[:80]}..."
        raise UsageError(shown or "path", expected="the path of a file or folder", found=found)


def is_plain_path(path: str) -> bool:
    """Whether `path` is relative, stays below its folder on every system, and can be printed."""
    posix = PurePosixPath(path)
    rooted = posix.is_absolute() or PureWindowsPath(path).drive or "\\" in path
    return bool(posix.parts) and ".." not in posix.parts and not rooted and path.isprintable()


def check_link(path: Path, named: Path, *, allow_links: bool = False) -> Path:
    """Return `path`, or raise BadInputError if it is a link, or behind one, not to be followed.

    Args:
        path: a file in the folder `named`.
        named: what the user named: links up to and including it are the user's own.
        allow_links: follow links that end inside `named`.
    """
    root, real = Path(os.path.realpath(named)), Path(os.path.realpath(path))
    inside = root in real.parents
    if real == root / path.relative_to(named) or (allow_links and inside):
        return path
    repository = find_cache_repository(root)
    if repository is not None and repository in real.parents:
        return path
    raise BadInputError(
        path,
        expected="a file that lies in its own folder",
        found=f"a link to {real}",
        remedy="put the file itself there, or allow links within the folder (--allow-links)"
        if inside
        else "put the file itself there: links that lead out of the folder are not followed",
    )


def find_cache_repository(directory: Path) -> Path | None:
    """Find the Hugging Face cache repository that a snapshot folder, or one below it, is in.

    Layout: `models--OWNER--NAME/snapshots/REVISION/...`, whose files link to `../../blobs/HASH`.
    """
    for snapshots, repository in pairwise((directory, *directory.parents)):
        if snapshots.name == "snapshots" and (repository / "blobs").is_dir():
            return repository
    return None
