"""Runs a planned merge: shards in a locked work folder, then the small files, then one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..bundle.fit import Fit, LayerVerdict, check_fits
from ..errors import FileAccessError
from ..files import strict_json
from ..files.staging import os_errors_named, publish, set_umask_mode, sync, work_folder
from ..files.write import check_space, copy_file
from ..models.base import Base
from ..types import Progress
from .base_files import MANIFEST, file_blocks, file_size
from .executors import OpenExecutor, run_tasks
from .journal import Journal
from .manifest import manifest_text
from .plan import ShardPlan, changed_tensors, index_text
from .report import MergeReport, layer_reports, survival_notes
from .shard import UNFINISHED, Count, WrittenShard, WrittenTensor, write_shard


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
        """A short hash of all that the output follows from.

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
        """The same with what the fits say of the bundles in its report."""
        bundles = tuple(
            replace(bundle, base_check=fit.verdict)
            for bundle, fit in zip(self.report.bundles, fits, strict=True)
        )
        notes = (*(note for fit in fits for note in fit.notes), *self.report.notes)
        return replace(self, report=replace(self.report, bundles=bundles, notes=notes))


def run_merge(
    plan: MergePlan, executor: OpenExecutor | None, *, force: bool, progress: Progress | None
) -> MergeReport:
    """Write the output of a merge, by `executor` or, without one, in this process."""
    out = plan.report.out
    with (
        work_folder(out, plan=plan.hash(), keep=True) as folder,
        os_errors_named(out, folder),
        _output_named(plan.report, folder),
    ):
        written, resumed = _write_shards(plan, folder, executor, progress)
        tensors = {name: one for shard in written for name, one in shard.tensors.items()}
        fits = _updated_fits(plan, tensors)
        check_fits(plan.base.directory, fits, allow_base_mismatch=plan.allow_base_mismatch)
        report = plan.with_fits(fits).report
        layers = layer_reports(changed_tensors(plan.shards), tensors)
        report = replace(
            report,
            layers=layers,
            shards={shard.name: shard.sha256 for shard in written},
            notes=(*report.notes, *survival_notes(layers)),
            resumed=tuple(plan.shards[number].name for number in sorted(resumed)),
        )
        staged = folder / out.name
        if plan.is_folder:
            _write_small_files(plan, staged, report, written, tensors)
            for path in (staged, *(p for p in staged.rglob("*") if p.is_dir())):
                sync(path)
        publish(staged, out, force=force)
        return report


@contextmanager
def _output_named(report: MergeReport, folder: Path) -> Iterator[None]:
    """Where work in progress cannot be written, name the output, and all the space it needs."""
    try:
        yield
    except FileAccessError as error:
        if Path(os.path.abspath(folder)) not in Path(os.path.abspath(error.where)).parents:
            raise
        raise FileAccessError(
            report.out,
            expected=f"to write all of its {report.disk_bytes:,} bytes",
            found=error.found,
            remedy=error.remedy,
        ) from error


def _write_shards(
    plan: MergePlan, folder: Path, executor: OpenExecutor | None, progress: Progress | None
) -> tuple[tuple[WrittenShard, ...], set[int]]:
    """All weight files, in their order, and the numbers of those that were there already."""
    journal = Journal(folder / "journal.jsonl", plan.shards)
    payload = folder / plan.report.out.name
    count = _byte_counter(plan.report.nbytes, progress)

    def place(name: str) -> Path:
        return payload / name if plan.is_folder else payload

    written = journal.finished(place, count)
    resumed = set(written)
    _remove_unfinished(folder, payload, {place(shard.name) for shard in written.values()})
    if plan.is_folder:
        payload.mkdir(exist_ok=True)
    check_space(folder, plan.report.disk_bytes - sum(shard.size for shard in written.values()))
    left = {n: shard for n, shard in enumerate(plan.shards) if n not in written}

    def done(number: int, shard: WrittenShard) -> None:
        set_umask_mode(place(shard.name))
        journal.add(number, shard)
        written[number] = shard
        if executor is not None:
            count(plan.shards[number].nbytes)

    if executor is None:
        for number, shard in left.items():
            done(number, write_shard(shard, place(shard.name), folder, count))
    else:
        absolute = Path(os.path.abspath(folder))
        tasks = {
            number: (shard, Path(os.path.abspath(place(shard.name))), absolute)
            for number, shard in left.items()
        }
        run_tasks(write_shard, tasks, executor, done)
    return tuple(written[number] for number in range(len(plan.shards))), resumed


def _remove_unfinished(folder: Path, payload: Path, keep: set[Path]) -> None:
    """Remove what a killed run left half done."""
    inside = payload.iterdir() if payload.is_dir() else ()
    for path in (*folder.glob(f"{UNFINISHED}*"), *inside):
        if path not in keep:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _updated_fits(plan: MergePlan, written: Mapping[str, WrittenTensor]) -> tuple[Fit, ...]:
    """The fits with the verdicts of the hashes, taken while the weights were read."""
    verdicts: list[dict[str, LayerVerdict]] = [{} for _ in plan.fits]
    for name, tensor in changed_tensors(plan.shards).items():
        for share, verdict in zip(tensor.shares, written[name].verdicts, strict=True):
            verdicts[share.number][share.layer] = verdict
    return tuple(fit.updated(one) for fit, one in zip(plan.fits, verdicts, strict=True))


def _write_small_files(
    plan: MergePlan,
    folder: Path,
    report: MergeReport,
    written: Sequence[WrittenShard],
    tensors: Mapping[str, WrittenTensor],
) -> None:
    """Everything but the weights."""
    checkpoint, source = plan.base.checkpoint, plan.base.directory
    texts = {}
    if checkpoint.index is not None:
        texts[checkpoint.index.name] = index_text(checkpoint, plan.shards)
    if plan.config != plan.base.config:
        texts["config.json"] = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
    files = {shard.name: (shard.sha256, shard.size) for shard in written}
    for name in report.carried:
        if name not in texts:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            size = file_size(source, name, allow_links=plan.allow_links)
            blocks = file_blocks(source, name, allow_links=plan.allow_links)
            files[name] = (copy_file(target, blocks, size), size)
    for name, text in texts.items():
        data = text.encode()
        files[name] = (copy_file(folder / name, [data], len(data)), len(data))
    manifest = manifest_text(
        report,
        plan.shards,
        changed_tensors(plan.shards),
        tensors,
        files,
        base_manifest=plan.base_manifest,
        allow_base_mismatch=plan.allow_base_mismatch,
    ).encode()
    copy_file(folder / MANIFEST, [manifest], len(manifest))


def _byte_counter(total: int, progress: Progress | None) -> Count:
    """A function that adds up bytes and reports them to `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("merging", min(done, total), total)

    return count


def _identity(path: Path) -> list[Any]:
    # Anybody can set the time of modification, and copying tools do; the time of change is the
    # system's. The device's number is left out: it may differ where a file system is shared.
    status = path.stat()
    return [path.name, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
