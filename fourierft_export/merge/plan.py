"""The output of a merge, shard by shard, before any of it is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..bundle.fit import Fit
from ..files import strict_json
from ..files.checkpoint import Checkpoint
from ..files.container import Header, TensorInfo
from ..files.dtypes import FLOAT_DTYPES
from ..files.write import Slot, sort_slots
from ..models.base import Base
from .changes import Changes, TensorPlan
from .report import MergeReport

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class ShardPlan:
    """One weight file of the output; all that a worker needs to write it.

    Attributes:
        name: its file name, that of the base's shard.
        source: the header of the base's shard.
        checkpoint: the base.
        tensors: in the order they are written; empty when the file is copied byte for byte.
        nbytes: size of the payloads.
    """

    name: str
    source: Header
    checkpoint: Checkpoint
    tensors: tuple[TensorPlan, ...]
    nbytes: int


@dataclass(frozen=True)
class MergePlan:
    """A merge in full, before anything is written.

    Attributes:
        base: the open base.
        fits: how the bundles fit it, by the samples of the fingerprints.
        shards: what is written.
        config: of the output.
        base_manifest: sha256 of the manifest.json in the base's folder; None without one.
        report: what is known of the merge so far.
        allow_links, allow_base_mismatch: as for `merge_checkpoint`.
    """

    base: Base
    fits: tuple[Fit, ...]
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any]
    base_manifest: str | None
    report: MergeReport
    allow_links: bool
    allow_base_mismatch: bool

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder, as the base is."""
        return self.base.directory.is_dir()

    def hash(self) -> str:
        """Hash everything that the output depends on; returns 16 hex digits.

        The base's files are identified by their names, sizes, inodes and times: to hash them would
        be to read everything twice.
        """
        checkpoint, report = self.base.checkpoint, self.report
        weights = [*checkpoint.shards, *([checkpoint.index] if checkpoint.index else [])]
        content = {
            "versions": [__version__, np.__version__],
            "base": [_identity(file) for file in weights],
            "bundles": [(bundle.sha256, bundle.weight) for bundle in report.bundles],
            "base_manifest": self.base_manifest,
            "config": dict(self.config),
            "carried": [_identity(self.base.directory / name) for name in report.carried],
            "options": [report.dtype, self.allow_base_mismatch, self.is_folder],
        }
        return hashlib.sha256(strict_json.canonical(content).encode()).hexdigest()[:16]

    def with_fits(self, fits: Sequence[Fit]) -> MergePlan:
        """Copy the plan, with the verdicts and notes of the fits in its report."""
        bundles = tuple(
            replace(bundle, base_check=fit.verdict)
            for bundle, fit in zip(self.report.bundles, fits, strict=True)
        )
        notes = (*(note for fit in fits for note in fit.notes), *self.report.notes)
        return replace(self, report=replace(self.report, bundles=bundles, notes=notes))


def plan_shards(base: Base, changes: Changes, dtype: str) -> tuple[ShardPlan, ...]:
    """Plan the shards of the output: the base's, in its order, with new tensors in the last."""
    checkpoint = base.checkpoint
    wanted = DTYPES.get(dtype)
    # transformers takes the dtype of a model without one in its config from its first tensor, so
    # a float32 head must not come first in a bfloat16 checkpoint.
    common = wanted or _most_common_float(checkpoint.tensors.values())
    shards = []
    for number, shard in enumerate(checkpoint.headers):
        tensors = []
        for info in shard.tensors.values():
            plan = changes.tensors.get(info.name)
            plan = plan or TensorPlan(Slot(info.name, info.dtype, info.shape), info)
            kept = info.dtype if info.dtype in FLOAT_DTYPES else common
            tensors.append(_named(plan, changes, wanted or kept))
        if number == len(checkpoint.headers) - 1:
            added = sorted(changes.tensors.keys() - checkpoint.tensors.keys())
            tensors += [_named(changes.tensors[key], changes, common) for key in added]
        order = {slot.name: n for n, slot in enumerate(sort_slots(t.slot for t in tensors))}
        tensors.sort(key=lambda plan: order[plan.slot.name])
        nbytes = sum(plan.slot.nbytes for plan in tensors)
        written = () if all(plan.is_copied for plan in tensors) else tuple(tensors)
        shards.append(ShardPlan(shard.path.name, shard, checkpoint, written, nbytes))
    return tuple(shards)


def format_index(checkpoint: Checkpoint, shards: Sequence[ShardPlan]) -> str:
    """Write the shard index of the output as transformers does."""
    where: dict[str, str] = {}
    elements = 0
    for shard in shards:
        slots = [plan.slot for plan in shard.tensors] or [
            Slot(info.name, info.dtype, info.shape) for info in shard.source.tensors.values()
        ]
        where.update((slot.name, shard.name) for slot in slots)
        elements += sum(prod(slot.shape) for slot in slots)
    metadata = dict(checkpoint.index_metadata)
    metadata["total_size"] = sum(shard.nbytes for shard in shards)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = elements
    return json.dumps({"metadata": metadata, "weight_map": where}, indent=2, sort_keys=True) + "\n"


def _named(plan: TensorPlan, changes: Changes, dtype: str) -> TensorPlan:
    """`plan` under its name in the output, and in `dtype` if it is a float tensor."""
    name, kind, shape = plan.slot
    slot = Slot(changes.out_name(name), dtype if kind in FLOAT_DTYPES else kind, shape)
    return replace(plan, slot=slot)


def _most_common_float(tensors: Iterable[TensorInfo]) -> str:
    """Return the float dtype that most bytes have."""
    sizes: Counter[str] = Counter()
    for info in tensors:
        if info.dtype in FLOAT_DTYPES:
            sizes[info.dtype] += info.nbytes
    return max(sizes, key=lambda name: (sizes[name], name), default="F32")


def list_replaced_and_added(
    base: Base, changes: Changes
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names in the output of tensors that are replaced, and of added ones."""
    replaced = [k for k, plan in changes.tensors.items() if plan.value is not None]
    return (
        tuple(changes.out_name(key) for key in sorted(replaced) if key in base.tensors),
        tuple(
            changes.out_name(key) for key in sorted(changes.tensors.keys() - base.tensors.keys())
        ),
    )


def list_changed_tensors(shards: Iterable[ShardPlan]) -> Mapping[str, TensorPlan]:
    """Return the tensors that get delta_W, by their names in the output."""
    return {plan.slot.name: plan for shard in shards for plan in shard.tensors if plan.shares}


def _identity(path: Path) -> list[Any]:
    # Anybody can set the time of modification, and copying tools do; the time of change is the
    # system's. The device's number is left out: it may differ where a file system is shared.
    status = path.stat()
    return [path.name, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
