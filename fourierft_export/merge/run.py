"""Carrying a merge out: shards in a locked work folder, then the small files, then one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..bundle.names import natural_key
from ..errors import FileAccessError
from ..files.staging import os_errors_named, publish, set_umask_mode, sync, work_folder
from ..files.write import check_space, copy_file
from ..types import Progress
from . import carry
from .check import Checked, settle
from .executors import OpenExecutor, run_tasks
from .job import Job, place, write_in_place, write_task
from .journal import Journal
from .manifest import base_facts, manifest_text
from .plan import OutShard, index_text
from .report import BundleReport, LayerReport, MergeReport, survival_notes
from .shard import WrittenShard, WrittenTensor

_JOURNAL = "journal.jsonl"


def carry_out(
    job: Job, executor: OpenExecutor | None, *, force: bool, progress: Progress | None
) -> MergeReport:
    """Write the output of a merge.

    Args:
        job: the merge.
        executor: where its shards are written; None for this process.
        force: replace an existing output.
        progress: called with ("merging", bytes done, bytes in all).

    Raises:
        As `merge_checkpoint`.
    """
    out = job.report.out
    with (
        work_folder(out, plan=job.plan(), keep=True) as folder,
        os_errors_named(out, folder),
        _output_named(job.report, folder),
    ):
        written, resumed = _write_shards(job, folder, executor, progress)
        job = replace(job, checked=_settled(job, written))
        staged = folder / out.name
        report = replace(
            _finished(job, written), resumed=tuple(job.shards[n].name for n in sorted(resumed))
        )
        if job.is_folder:
            _write_small_files(job, staged, report, written)
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
    job: Job, folder: Path, executor: OpenExecutor | None, progress: Progress | None
) -> tuple[tuple[WrittenShard, ...], set[int]]:
    """All weight files, in their order, and the numbers of those that were there already."""
    journal = Journal(folder / _JOURNAL, job.shards)
    payload, total = job.report.out.name, job.report.nbytes
    count = _meter(total, progress)

    def target(name: str) -> Path:
        return place(folder, payload, job.is_folder, name)

    written = dict(journal.verified(target, count))
    resumed = set(written)
    _tidy(job, folder, {target(shard.name) for shard in written.values()})
    if job.is_folder:
        (folder / payload).mkdir(exist_ok=True)
    check_space(folder, job.report.disk_bytes - sum(shard.size for shard in written.values()))
    left = [number for number in range(len(job.shards)) if number not in written]

    def done(number: int, shard: WrittenShard) -> None:
        set_umask_mode(target(shard.name))
        journal.add(number, shard)
        written[number] = shard

    if executor is None or not left:
        for number in left:
            shard = job.shards[number]
            base = job.base.checkpoint
            done(number, write_in_place(shard, base, folder, target(shard.name), count))
    else:

        def done_elsewhere(number: int, shard: WrittenShard) -> None:
            done(number, shard)
            count(job.shards[number].nbytes)

        job.save(folder)
        run_tasks(write_task, os.path.abspath(folder), left, executor, done_elsewhere)
    return tuple(written[number] for number in range(len(job.shards))), resumed


def _tidy(job: Job, folder: Path, keep: set[Path]) -> None:
    """Remove what a killed run left half done."""
    payload = folder / job.report.out.name
    inside = payload.iterdir() if payload.is_dir() else ()
    for path in (*folder.glob(".writing-*"), *inside):
        if path not in keep:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _settled(job: Job, written: Sequence[WrittenShard]) -> tuple[Checked, ...]:
    """The bundles with the verdicts on the weights as they were read."""
    index = {id(item.ingredient): number for number, item in enumerate(job.checked)}
    found: list[dict[str, str]] = [{} for _ in job.checked]
    results = _written_tensors(written)
    for shard in job.shards:
        for tensor in shard.tensors:
            if tensor.change is None:
                continue
            verdicts = results[tensor.slot.name].verdicts
            for part, verdict in zip(tensor.change.parts, verdicts, strict=True):
                if verdict is not None:
                    found[index[id(part.ingredient)]][part.layer] = verdict
    return settle(job.base, job.checked, found, job.allow_base_mismatch)


def _write_small_files(
    job: Job, folder: Path, report: MergeReport, written: Sequence[WrittenShard]
) -> None:
    """Everything but the weights."""
    checkpoint = job.base.checkpoint
    texts = {}
    if checkpoint.index is not None:
        texts[checkpoint.index.name] = index_text(checkpoint, job.shards)
    if job.config != job.base.config:
        texts["config.json"] = json.dumps(job.config, indent=2, sort_keys=True) + "\n"
    files = {shard.name: (shard.sha256, shard.size) for shard in written}
    source, links = job.base.directory, job.allow_links
    for name in job.companions.carried:
        if name not in texts:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            size = carry.file_size(source, name, allow_links=links)
            blocks = carry.file_blocks(source, name, allow_links=links)
            files[name] = (copy_file(target, blocks, size), size)
    for name, text in texts.items():
        data = text.encode()
        files[name] = (copy_file(folder / name, [data], len(data)), len(data))
    sources = {
        tensor.slot.name: tensor.change.source
        for shard in job.shards
        for tensor in shard.tensors
        if tensor.change is not None
    }
    manifest = manifest_text(
        report,
        base_facts(job.shards, report.shards, job.base_manifest),
        _written_tensors(written),
        sources,
        files,
        allow_base_mismatch=job.allow_base_mismatch,
    ).encode()
    copy_file(folder / carry.MANIFEST, [manifest], len(manifest))


def layer_reports(
    shards: Sequence[OutShard], results: Mapping[str, WrittenTensor] | None = None
) -> tuple[LayerReport, ...]:
    """One report for each weight that gets delta_W, in natural order of the layers' names."""
    reports = []
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.change is not None:
                slot, result = tensor.slot, (results or {}).get(tensor.slot.name)
                known = (result.survival, result.error) if result else (None, None)
                reports.append(
                    LayerReport(tensor.change.name, slot.name, slot.shape, slot.dtype, *known)
                )
    return tuple(sorted(reports, key=lambda layer: natural_key(layer.name)))


def with_verdicts(report: MergeReport, checked: Sequence[Checked]) -> MergeReport:
    """`report` with what is known of the bundles."""
    summaries = [item.summary() for item in checked]
    bundles = tuple(
        BundleReport(
            item.ingredient.name,
            item.sha256,
            item.ingredient.weight,
            len(item.ingredient.layers),
            verdict,
        )
        for item, (verdict, _) in zip(checked, summaries, strict=True)
    )
    notes = tuple(note for _, more in summaries for note in more)
    return replace(report, bundles=bundles, notes=(*notes, *report.notes))


def _finished(job: Job, written: Sequence[WrittenShard]) -> MergeReport:
    report = with_verdicts(job.report, job.checked)
    layers = layer_reports(job.shards, _written_tensors(written))
    return replace(
        report,
        layers=layers,
        shards={shard.name: shard.sha256 for shard in written},
        notes=(*report.notes, *survival_notes(layers)),
    )


def _written_tensors(written: Sequence[WrittenShard]) -> dict[str, WrittenTensor]:
    return {name: result for shard in written for name, result in shard.tensors.items()}


def _meter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """A counter of bytes that reports to `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("merging", min(done, total), total)

    return count
