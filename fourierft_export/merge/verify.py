"""`verify_merged`: checks that a merged folder still is what its manifest says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInputError, FileAccessError, ValidationError
from ..types import Progress
from .base_files import MANIFEST, hash_file, sort_files
from .manifest import read_manifest


@dataclass(frozen=True)
class VerifyReport:
    """What a check of a merged folder found.

    Attributes:
        directory: the folder.
        files: how many its manifest lists.
        nbytes: their size, as it should be.
        problems: one line for each file that is missing or changed, and for weights that are not
            listed, which a loader would prefer.
        unlisted: files that are there and that the manifest does not list.
    """

    directory: Path
    files: int
    nbytes: int
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the folder is what its manifest says."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "directory": str(self.directory),
            "ok": self.ok,
            "files": self.files,
            "bytes": self.nbytes,
            "problems": list(self.problems),
            "unlisted": list(self.unlisted),
        }

    def raise_for_failure(self) -> None:
        """Raise if there are problems.

        Raises:
            ValidationError: listing them.
        """
        if self.problems:
            raise ValidationError(
                self.directory,
                expected=f"the {self.files} files that its {MANIFEST} lists",
                found=f"{len(self.problems)} that are missing, changed or not listed",
                remedy="merge again",
                offenders=self.problems,
            )


def verify_merged(
    directory: str | os.PathLike[str], *, progress: Progress | None = None
) -> VerifyReport:
    """Checks a folder that `merge_checkpoint` wrote against its manifest.

    Args:
        directory: the folder.
        progress: called with ("verifying", bytes done, bytes in all).

    Returns:
        What was checked, and which files are missing, damaged or unknown.

    Raises:
        FileAccessError: the folder or its manifest is missing or unreadable.
        BadInputError: `directory` is a file; the manifest is damaged, or names files outside of the
            folder.
    """
    folder = Path(directory)
    if not os.path.lexists(folder):
        raise FileAccessError(folder, expected="a folder that merge wrote", found="none")
    if not folder.is_dir():
        raise BadInputError(
            folder,
            expected="a folder that merge wrote",
            found="a file",
            remedy="merge writes a manifest.json only into folders",
        )
    if not os.path.lexists(folder / MANIFEST):
        raise FileAccessError(
            folder / MANIFEST,
            expected="the manifest that merge writes",
            found="none",
            remedy="only a folder that merge wrote can be verified",
        )
    manifest = read_manifest(folder / MANIFEST)
    listed: Mapping[str, tuple[str, int]] = {
        name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()
    }
    total, done = sum(size for _, size in listed.values()), 0
    problems: list[str] = []
    for name, expected in sorted(listed.items()):
        problems += _problems(folder, name, expected)
        done += expected[1]
        if progress:
            progress("verifying", done, total)
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    unlisted = sorted(there - listed.keys() - {MANIFEST})
    weights = {*sort_files(folder)[1]}
    problems += [f"{name}: weights that the manifest does not list" for name in unlisted
                 if name in weights]  # fmt: skip
    return VerifyReport(folder, len(listed), total, tuple(problems), tuple(unlisted))


def _problems(folder: Path, name: str, expected: tuple[str, int]) -> list[str]:
    """Compare one file with the sha256 and size in the manifest."""
    path = folder / name
    if not os.path.lexists(path):
        return [f"{name}: missing"]
    if not path.is_file():
        return [f"{name}: not a regular file"]
    size = path.stat().st_size
    if size != expected[1]:
        return [f"{name}: {size:,} bytes instead of {expected[1]:,}"]
    if hash_file(path.parent, path.name) == expected:
        return []
    return [f"{name}: other bytes than were written"]
