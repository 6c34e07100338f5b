"""Which symbolic links are followed when files of a downloaded folder are read.

A link in a downloaded folder can point anywhere on the machine, and a verb that copies what it
reads would copy that. Models in the Hugging Face cache are nothing but links, so those that stay
inside their own cache repository are followed without asking.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import BadInputError


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
