"""manifest.json of a merged folder: what it was made of, by what, and its hashes.

It holds no time and no machine, so the same merge gives the same bytes. `verify_merged` checks a
folder against it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import BadInputError, FileAccessError, ValidationError
from ..files import strict_json
from ..files.safe_paths import check_path, is_plain_path
from ..files.safetensors_reader import read_file
from ..types import Progress, byte_counter
from .base_files import MANIFEST, hash_file, sort_files
from .plan import MergePlan, list_changed_tensors
from .report import MergeReport
from .shard import WrittenTensor

SCHEMA = 1
KIND = "fourierft_export.merge"


def format_manifest(
    plan: MergePlan,
    report: MergeReport,
    written: Mapping[str, WrittenTensor],
    files: Mapping[str, tuple[str, int]],
) -> str:
    """Write the manifest of a finished merge, as JSON text.

    The base is identified by hashes that are known without reading it once more: those of shards
    that were copied byte for byte, and those of the weights that were changed.

    Args:
        plan, report: of the merge.
        written: the changed weights, by their names in the output.
        files: sha256 in hex and size in bytes of every file of the output but the manifest.
    """
    changed = list_changed_tensors(plan.shards)
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "versions": {"fourierft_export": __version__, "numpy": np.__version__},
        "base": {
            "name": report.base.name,
            "shards": {
                shard.name: {"bytes": shard.source.size}
                | ({} if shard.tensors else {"sha256": report.shards[shard.name]})
                for shard in plan.shards
            },
            "manifest_sha256": plan.base_manifest,
        },
        "bundles": [
            asdict(b) | {"name": Path(os.path.abspath(b.name)).name} for b in report.bundles
        ],
        "dtype": report.dtype,
        "allow_base_mismatch": plan.allow_base_mismatch,
        "tensors": {
            name: {
                "layer": changed[name].layer,
                "sha256": tensor.sha256,
                "source": source.name if (source := changed[name].source) else None,
                "source_sha256": tensor.source_sha256,
                "survival": tensor.survival,
                "error": tensor.error,
            }
            for name, tensor in sorted(written.items())
        },
        "replaced": list(report.replaced),
        "added": list(report.added),
        "notes": list(report.notes),
        "shards": dict(sorted(report.shards.items())),
        "files": {
            name: {"sha256": sha256, "bytes": size}
            for name, (sha256, size) in sorted(files.items())
        },
    }
    return json.dumps(content, indent=2) + "\n"


@dataclass(frozen=True)
class VerifyReport:
    """What a check of a merged folder found."""

    directory: Path  # the folder
    files: int  # how many its manifest lists
    nbytes: int  # their size, as it should be
    # One line for each file that is missing or changed, and for weights that are not listed, which
    # a loader would prefer.
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]  # files that are there and that the manifest does not list

    @property
    def ok(self) -> bool:
        """Whether the folder is what its manifest says."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        fields = asdict(self) | {"directory": str(self.directory), "ok": self.ok}
        fields["bytes"] = fields.pop("nbytes")
        return fields

    def raise_for_failure(self) -> None:
        """Raise a ValidationError that lists the problems, if there are any."""
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
    check_path(directory)
    folder = Path(directory)
    if folder.is_file():
        remedy = "merge writes a manifest.json only into folders"
        raise BadInputError(folder, expected="a folder", found="a file", remedy=remedy)
    if not os.path.lexists(folder / MANIFEST):
        raise FileAccessError(
            folder / MANIFEST,
            expected="the manifest that merge writes",
            found="none",
            remedy="only a folder that merge wrote can be verified",
        )
    listed = _read_files(folder / MANIFEST)
    total = sum(size for _, size in listed.values())
    count = byte_counter("verifying", total, progress)
    problems: list[str] = []
    for name, expected in sorted(listed.items()):
        problems += _problems(folder, name, expected)
        count(expected[1])
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    unlisted = sorted(there - listed.keys() - {MANIFEST})
    _, weights = sort_files(folder)
    more = [f"{n}: weights that the manifest does not list" for n in unlisted if n in weights]
    return VerifyReport(folder, len(listed), total, (*problems, *more), tuple(unlisted))


def _read_files(path: Path) -> dict[str, tuple[str, int]]:
    """Read what a manifest says of every file: its sha256 and size."""
    manifest = strict_json.loads(read_file(path), os.fspath(path))
    files: dict[str, tuple[str, int]] = {}
    found = ""
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        found = "something else"
    elif manifest.get("schema") != SCHEMA:
        found = f"schema {manifest.get('schema')!r}"
    elif not isinstance(manifest.get("files"), dict):
        found = "one without files"
    else:
        for name, entry in manifest["files"].items():
            fields = entry if isinstance(entry, dict) else {}
            sha256, size = fields.get("sha256"), fields.get("bytes")
            is_hash = re.fullmatch("[0-9a-f]{64}", str(sha256)) is not None
            is_size = type(size) is int and 0 <= size < 2**63
            if not (is_plain_path(name) and is_hash and is_size):
                found = f"a bad entry {name!r}"
                break
            files[name] = (str(sha256), size or 0)
    if found:
        expected = f"a manifest of a merge, schema {SCHEMA}"
        raise BadInputError(path, expected=expected, found=found, remedy="merge again")
    return files


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
