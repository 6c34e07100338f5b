"""The output of a merge, shard by shard, before any of it is written; the memory that it takes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..bundle.fit import Fit
from ..errors import FileAccessError
from ..files import strict_json
from ..files.checkpoint import Checkpoint
from ..files.dtypes import DTYPE_BITS, FLOAT_DTYPES
from ..files.hashed_write import IN_FLIGHT
from ..files.safetensors_reader import Header
from ..models.base_tensors import Base
from ..spectral.cost import choose_delta_path
from .changes import Changes, TensorPlan
from .report import MergeReport

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Bytes: the interpreter, numpy, blocks of delta_W and their tables.
_PROCESS = 192 << 20


@dataclass(frozen=True)
class ShardPlan:
    """One weight file of the output, named like the base's; all that a worker needs to write it."""

    name: str
    source: Header  # of the base's shard
    checkpoint: Checkpoint
    tensors: tuple[TensorPlan, ...]  # in their order; empty for a file copied byte for byte
    nbytes: int  # of the payloads


@dataclass(frozen=True)
class MergePlan:
    """A merge in full, before anything is written."""

    base: Base
    fits: tuple[Fit, ...]  # by the samples of the fingerprints
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any]  # of the output
    base_manifest: str | None  # sha256 of the base's own manifest.json
    report: MergeReport  # what is known so far
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


def _identity(path: Path) -> list[Any]:
    # Anybody can set the time of modification, and copying tools do; the time of change is the
    # system's. The device's number is left out: it may differ where a file system is shared.
    status = path.stat()
    return [path.name, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def plan_shards(base: Base, changes: Changes, dtype: str) -> tuple[ShardPlan, ...]:
    """Plan the shards of the output: the base's, in its order, with new tensors in the last."""
    checkpoint = base.checkpoint
    wanted = DTYPES.get(dtype)
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in FLOAT_DTYPES:
            sizes[info.dtype] += info.nbytes
    # transformers takes the dtype of a model without one in its config from its first tensor, so
    # a float32 head must not come first in a bfloat16 checkpoint.
    common = wanted or max(sizes, key=lambda name: (sizes[name], name), default="F32")

    def named(plan: TensorPlan, kept: str) -> TensorPlan:
        """Give a tensor its name in the output, and its dtype if it is a float tensor."""
        kind = (wanted or kept) if plan.dtype in FLOAT_DTYPES else plan.dtype
        return replace(plan, name=changes.out_name(plan.name), dtype=kind)

    shards = []
    for shard in checkpoint.headers:
        tensors = []
        for info in shard.tensors.values():
            plan = TensorPlan(info.name, info.dtype, info.shape, info)
            kept = info.dtype if info.dtype in FLOAT_DTYPES else common
            tensors.append(named(changes.tensors.get(info.name, plan), kept))
        if shard is checkpoint.headers[-1]:
            added = sorted(changes.tensors.keys() - checkpoint.tensors.keys())
            tensors += [named(changes.tensors[key], common) for key in added]
        # Readers view payloads in place, which needs every tensor aligned to its element size.
        tensors.sort(key=lambda plan: -DTYPE_BITS[plan.dtype])
        nbytes = sum(plan.nbytes for plan in tensors)
        written = () if all(plan.is_copied for plan in tensors) else tuple(tensors)
        shards.append(ShardPlan(shard.path.name, shard, checkpoint, written, nbytes))
    return tuple(shards)


def format_index(checkpoint: Checkpoint, shards: Sequence[ShardPlan]) -> str:
    """Write the shard index of the output as transformers does."""
    where: dict[str, str] = {}
    elements = 0
    for shard in shards:
        stored: list[Any] = [*(shard.tensors or shard.source.tensors.values())]
        where.update((one.name, shard.name) for one in stored)
        elements += sum(prod(one.shape) for one in stored)
    metadata = dict(checkpoint.index_metadata)
    metadata["total_size"] = sum(shard.nbytes for shard in shards)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = elements
    content = {"metadata": metadata, "weight_map": where}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def list_changed_tensors(shards: Iterable[ShardPlan]) -> Mapping[str, TensorPlan]:
    """Return the tensors that get delta_W, by their names in the output."""
    return {plan.name: plan for shard in shards for plan in shard.tensors if plan.shares}


def estimate_memory(shards: Sequence[ShardPlan]) -> int:
    """Estimate the bytes of memory that one process needs, whatever the checkpoint's size."""
    # Three changed weights at a time: one is written, one waits, one is computed.
    changed = [_changed_bytes(t) for s in shards for t in s.tensors if t.shares]
    dense = sum(t.value.nbytes for s in shards for t in s.tensors if t.value is not None)
    return 3 * max(changed, default=0) + 2 * dense + IN_FLIGHT + _PROCESS


def _changed_bytes(plan: TensorPlan) -> int:
    rows, columns = plan.shape
    frequencies = sum(len(share.bundle.spectra[share.layer]) for share in plan.shares)
    by_columns = choose_delta_path((rows, columns), frequencies) == "columns"
    converts = plan.source is not None and plan.source.dtype != plan.dtype
    # Another dtype needs a second array (float64 at most); that path, a layer's half spectrum.
    return plan.nbytes + rows * columns * 8 * (converts + by_columns)


def check_memory(needed: int, workers: int) -> None:
    """Refuse work of `workers` processes that need `needed` bytes each, if there are less."""
    available = read_available_memory()
    if available is not None and needed * workers > available:
        raise FileAccessError(
            "memory",
            expected=f"{needed * workers:,} bytes for {workers} process(es)",
            found=f"{available:,} bytes available",
            remedy="use fewer workers" if workers > 1 else "merge on a machine with more memory",
        )


def read_available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process can still get; None if unknown.

    A container sees the memory of its machine; what it may use is the limit of its control group.
    """
    found = []
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        found.append(int(fields["MemAvailable"].split()[0]) << 10)
        found.append(int((root / "sys/fs/cgroup/memory.max").read_text()))
    except (OSError, KeyError, ValueError):  # another system; a group without a limit
        if not found and hasattr(os, "sysconf"):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)
