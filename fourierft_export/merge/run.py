"""Runs a planned merge: shards in a locked work folder, then the small files, then one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..bundle.fit import Fit, LayerVerdict, check_fits
from ..bundle.layer_templates import natural_key
from ..files.staging import name_os_errors, open_work_folder, publish
from ..files.write import check_space, copy_file, set_umask_mode, sync
from ..types import Progress, byte_counter
from .base_files import MANIFEST, read_blocks
from .changes import TensorPlan
from .executors import OpenExecutor, run_tasks
from .journal import Journal
from .manifest import format_manifest
from .plan import MergePlan, format_index, list_changed_tensors
from .report import LayerReport, MergeReport, note_low_survival
from .shard import UNFINISHED, WrittenShard, WrittenTensor, write_shard


def run_merge(
    plan: MergePlan, executor: OpenExecutor | None, *, force: bool, progress: Progress | None
) -> MergeReport:
    """Write the output of a merge, by `executor` or, without one, in this process.

    Raises:
        UsageError: the output appeared meanwhile, and `force` is not set.
        BadInputError: a weight that overflows; a base file that changed meanwhile.
        BaseMismatchError: weights that are not those of the fingerprints.
        FileAccessError: files that cannot be read or written, no space.
    """
    out = plan.report.out
    with (
        open_work_folder(out, plan=plan.hash(), keep=True) as folder,
        name_os_errors(out, folder, plan.report.disk_bytes),
    ):
        written, resumed = _write_shards(plan, folder, executor, progress)
        tensors = {name: one for shard in written for name, one in shard.tensors.items()}
        fits = _updated_fits(plan, tensors)
        check_fits(plan.base.directory, fits, allow_base_mismatch=plan.allow_base_mismatch)
        report = plan.with_fits(fits).report
        layers = report_layers(list_changed_tensors(plan.shards), tensors)
        report = replace(
            report,
            layers=layers,
            shards={shard.name: shard.sha256 for shard in written},
            notes=(*report.notes, *note_low_survival(layers)),
            resumed=tuple(plan.shards[number].name for number in sorted(resumed)),
        )
        staged = folder / out.name
        if plan.is_folder:
            _write_small_files(plan, staged, report, written, tensors)
            for path in (staged, *(p for p in staged.rglob("*") if p.is_dir())):
                sync(path)
        publish(staged, out, force=force)
        return report


def _write_shards(
    plan: MergePlan, folder: Path, executor: OpenExecutor | None, progress: Progress | None
) -> tuple[tuple[WrittenShard, ...], set[int]]:
    """Write all weight files; returns them in their order, and the numbers of those resumed."""
    journal = Journal(folder / "journal.jsonl", plan.shards)
    payload = folder / plan.report.out.name
    count = byte_counter("merging", plan.report.nbytes, progress)

    def place(name: str) -> Path:
        return payload / name if plan.is_folder else payload

    written = journal.read_finished(place, count)
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
    """Remove the files that a killed run had not finished."""
    inside = payload.iterdir() if payload.is_dir() else ()
    for path in (*folder.glob(f"{UNFINISHED}*"), *inside):
        if path not in keep:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def report_layers(
    plans: Mapping[str, TensorPlan], written: Mapping[str, WrittenTensor] | None = None
) -> tuple[LayerReport, ...]:
    """Report each weight that gets delta_W, in natural order of the layers' names.

    `plans` and `written` (None in a dry run) are by the weights' names in the output.
    """
    reports = []
    for name, plan in plans.items():
        facts = (written[name].survival, written[name].error) if written else (None, None)
        reports.append(LayerReport(plan.layer, name, plan.slot.shape, plan.slot.dtype, *facts))
    return tuple(sorted(reports, key=lambda layer: natural_key(layer.name)))


def _updated_fits(plan: MergePlan, written: Mapping[str, WrittenTensor]) -> tuple[Fit, ...]:
    """Put the verdicts of the hashes, taken while the weights were read, in the fits."""
    verdicts: list[dict[str, LayerVerdict]] = [{} for _ in plan.fits]
    for name, tensor in list_changed_tensors(plan.shards).items():
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
    """Write everything but the weights."""
    checkpoint, source = plan.base.checkpoint, plan.base.directory
    texts = {}
    if checkpoint.index is not None:
        texts[checkpoint.index.name] = format_index(checkpoint, plan.shards)
    if plan.config != plan.base.config:
        texts["config.json"] = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
    files = {shard.name: (shard.sha256, shard.size) for shard in written}
    for name in (*report.carried, *texts):
        if name in files:
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in texts:
            sha256 = copy_file(target, [texts[name].encode()])
        else:
            sha256 = copy_file(target, read_blocks(source, name, allow_links=plan.allow_links))
        files[name] = (sha256, target.stat().st_size)
    copy_file(folder / MANIFEST, [format_manifest(plan, report, tensors, files).encode()])
