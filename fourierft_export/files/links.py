"""Which symbolic links are followed when files are read out of a folder that somebody else made.

A link in a downloaded folder can point anywhere on the machine, and a verb that copies what it
reads would copy that. Models in the Hugging Face cache are nothing but links, so those that stay
inside their own cache repository are followed without asking.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from ..errors import BadInputError


def checked_file(path: Path, named: Path, *, allow_links: bool = False) -> Path:
    """`path` itself, once it is known not to lead where it must not.

    `named` is the folder that the user named, which `path` lies in: a link up to and including it
    is the user's own. With `allow_links`, links that end inside `named` are followed.

    Raises:
        BadInputError: `path` is, or lies behind, a link that leads out of `named` and out of the
            cache repository that `named` belongs to, or any other link without `allow_links`.
    """
    root = Path(os.path.realpath(named))
    real = Path(os.path.realpath(path))
    if real == root / path.relative_to(named):
        return path
    repository = cache_repository(root)
    if repository is not None and repository in real.parents:
        return path
    if allow_links and root in real.parents:
        return path
    inside = root in real.parents
    raise BadInputError(
        path,
        expected="a file that lies in its own folder",
        found=f"a link to {real}",
        remedy="put the file itself there, or allow links within the folder (--allow-links)"
        if inside
        else "put the file itself there: links that lead out of the folder are not followed",
    )


def real_paths(source: str | os.PathLike[str]) -> Iterator[Path]:
    """Where a file or folder really lies, and where every link below it leads; none is entered."""
    yield Path(os.path.realpath(source))
    for folder, subfolders, files in os.walk(source):
        for name in (*subfolders, *files):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                yield Path(os.path.realpath(path))


def cache_repository(directory: Path) -> Path | None:
    """The Hugging Face cache repository that a resolved snapshot folder, or one below it, is in.

    Layout: `models--OWNER--NAME/snapshots/REVISION/...`, whose files link to `../../blobs/HASH`.
    """
    chain = (directory, *directory.parents)
    for snapshots, repository in pairwise(chain):
        if snapshots.name == "snapshots" and (repository / "blobs").is_dir():
            return repository
    return None
