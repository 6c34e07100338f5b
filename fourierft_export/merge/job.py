"""A merge that has been checked and laid out; workers lay it out again from its work folder."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..bundle.file import Bundle
from ..errors import BadInputError
from ..files import strict_json
from ..files.checkpoint import Checkpoint
from ..files.container import read_file
from ..models.base import Base, open_base
from . import carry
from .changes import collect
from .check import Checked, prepared
from .plan import OutShard, lay_out
from .report import MergeReport
from .shard import Count, WrittenShard, write_shard

JOB_FILE = "job.json"
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Job:
    """A merge in full.

    Attributes:
        base: the open base.
        checked: the bundles.
        shards: what is written.
        config: of the output.
        companions: the files that go along.
        base_manifest: sha256 of the manifest.json in the base's folder; None without one.
        report: what is known of it so far.
        dtype: "keep" or the dtype asked for.
        allow_links, allow_base_mismatch: as for `merge_checkpoint`.
    """

    base: Base
    checked: tuple[Checked, ...]
    shards: tuple[OutShard, ...]
    config: Mapping[str, Any]
    companions: carry.Companions
    base_manifest: str | None
    report: MergeReport
    dtype: str
    allow_links: bool
    allow_base_mismatch: bool

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder, as the base is."""
        return self.base.directory.is_dir()

    def plan(self) -> str:
        """A short hash of all that the output follows from.

        The base's files are told by their names, sizes, inodes and times: hashing them would be to
        read everything twice.
        """
        directory = self.base.directory
        content = {
            "versions": [__version__, np.__version__],
            "base": base_identity(self.base.checkpoint),
            "bundles": [(c.sha256, c.ingredient.weight) for c in self.checked],
            "base_manifest": self.base_manifest,
            "config": dict(self.config),
            "carried": [_identity(directory / name) for name in self.companions.carried],
            "options": [self.dtype, self.allow_base_mismatch, self.is_folder],
        }
        return hashlib.sha256(strict_json.canonical(content).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Leave in a work folder what workers need."""
        bundles = []
        for number, item in enumerate(self.checked, 1):
            file = folder / f"bundle-{number}"
            _replace(file, item.ingredient.bundle.to_bytes())
            bundles.append({"name": item.ingredient.name, "weight": item.ingredient.weight})
        fields = {
            "base": os.path.abspath(self.base.directory),
            "identity": base_identity(self.base.checkpoint),
            "dtype": self.dtype,
            "allow_links": self.allow_links,
            "bundles": bundles,
            "payload": self.report.out.name,
            "is_folder": self.is_folder,
        }
        _replace(folder / JOB_FILE, json.dumps(fields).encode())


def place(folder: Path, payload: str, is_folder: bool, name: str) -> Path:
    """Where a finished weight file lies in a work folder."""
    return folder / payload / name if is_folder else folder / payload


def write_in_place(
    shard: OutShard, checkpoint: Checkpoint, folder: Path, target: Path, count: Count
) -> WrittenShard:
    """Write a weight file under a name of its own, and rename it when it is complete.

    Two workers may do this for one shard, if one of them was taken for dead: they write the same.
    """
    temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        written = write_shard(shard, temporary, checkpoint, count)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def write_task(folder: str, number: int) -> WrittenShard:
    """One task: write shard `number` of the merge whose work folder this is.

    Raises:
        BadInputError: the base is not the one that the merge was laid out for.
    """
    fields, checkpoint, shards = _laid_out(folder)
    target = place(Path(folder), fields["payload"], fields["is_folder"], shards[number].name)
    return write_in_place(shards[number], checkpoint, Path(folder), target, lambda _: None)


@lru_cache(maxsize=1)
def _laid_out(folder: str) -> tuple[dict[str, Any], Checkpoint, tuple[OutShard, ...]]:
    """The merge of a work folder, laid out as by the process that began it."""
    where = Path(folder)
    fields = json.loads(read_file(where / JOB_FILE))
    base = open_base(fields["base"], allow_links=fields["allow_links"])
    if base_identity(base.checkpoint) != fields["identity"]:
        raise BadInputError(
            fields["base"],
            expected="the base that the merge began with",
            found="one that changed, or another on this machine",
            remedy="all workers must see the same files",
        )
    ingredients = [
        prepared(base, b["name"], Bundle.load(where / f"bundle-{number}"), b["weight"])
        for number, b in enumerate(fields["bundles"], 1)
    ]
    shards = lay_out(base.checkpoint, collect(base, ingredients), fields["dtype"])
    return fields, base.checkpoint, shards


def base_identity(checkpoint: Checkpoint) -> list[list[Any]]:
    """Names, sizes, inodes and times of the files of a checkpoint."""
    files: Sequence[Path] = [*checkpoint.shards, *([checkpoint.index] if checkpoint.index else [])]
    return [_identity(file) for file in files]


def _identity(path: Path) -> list[Any]:
    # Anybody can set the time of modification, and copying tools do; the time of change is the
    # system's. The device's number is left out: it may differ where a file system is shared.
    status = path.stat()
    return [path.name, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
