"""Runs a planned merge: shards in a locked work folder, then the small files, then one rename.

For each finished shard a record is written to the work folder. After a kill, a shard counts as
finished if its record describes it and if its file still has the hash in the record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePath

from ..bundle.fit import Fit, LayerVerdict, check_fits
from ..bundle.layer_templates import natural_key
from ..errors import FourierFTError
from ..files import strict_json
from ..files.hashed_write import check_space, name_os_errors, set_umask_mode, sync, write_file
from ..files.safetensors_reader import read_file
from ..files.staging import open_work_folder, publish, remove
from ..types import Progress, byte_counter
from .base_files import MANIFEST, hash_file, read_blocks
from .changes import TensorPlan
from .executors import OpenExecutor, run_tasks
from .manifest import format_manifest
from .plan import MergePlan, ShardPlan, format_index, list_changed_tensors
from .report import LayerReport, MergeReport, note_errors
from .shard import UNFINISHED, WrittenShard, WrittenTensor, write_shard


def run_merge(
    plan: MergePlan, executor: OpenExecutor | None, *, force: bool, progress: Progress | None
) -> MergeReport:
    """Write the output of a merge, by `executor` or, without one, in this process."""
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
            notes=(*report.notes, *note_errors(layers)),
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
    payload = folder / plan.report.out.name
    count = byte_counter("merging", plan.report.nbytes, progress)

    def place(name: str) -> Path:
        return payload / name if plan.is_folder else payload

    written = {
        number: read
        for number, shard in enumerate(plan.shards)
        if (read := _read_finished(_record(folder, number), shard, place(shard.name)))
    }
    resumed = set(written)
    for finished in written.values():
        count(finished.size)
    if plan.is_folder:
        payload.mkdir(exist_ok=True)
    inside = payload.iterdir() if plan.is_folder else [payload]
    for path in {*folder.glob(f"{UNFINISHED}*"), *inside}:
        if path not in {place(shard.name) for shard in written.values()}:
            remove(path)
    check_space(folder, plan.report.disk_bytes - sum(shard.size for shard in written.values()))
    left = {n: shard for n, shard in enumerate(plan.shards) if n not in written}

    def done(number: int, shard: WrittenShard) -> None:
        set_umask_mode(place(shard.name))
        record_finished(_record(folder, number), shard)
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


def _record(folder: Path, number: int) -> Path:
    return folder / f"finished-{number}.json"


def record_finished(path: Path, shard: WrittenShard) -> None:
    """Write the record that a shard is complete and flushed."""
    path.unlink(missing_ok=True)
    write_file(path, [json.dumps(asdict(shard)).encode()])


def _read_finished(path: Path, plan: ShardPlan, file: Path) -> WrittenShard | None:
    """Read the record of a shard; None without one, or if the shard is not what it says."""
    try:
        fields = strict_json.loads(read_file(path), str(path))
        tensors = {
            name: WrittenTensor(**{**one, "verdicts": tuple(one["verdicts"])})
            for name, one in fields["tensors"].items()
        }
        shard = WrittenShard(**{**fields, "tensors": tensors})
        good = shard.name == plan.name and tensors.keys() == list_changed_tensors([plan]).keys()
        whole = good and hash_file(file.parent, file.name) == (shard.sha256, shard.size)
    except (FourierFTError, AttributeError, KeyError, TypeError):
        return None
    return shard if whole else None


def report_layers(
    plans: Mapping[str, TensorPlan], written: Mapping[str, WrittenTensor] | None = None
) -> tuple[LayerReport, ...]:
    """Report each weight that gets delta_W (by its name in the output), in natural order."""
    reports = []
    for name, plan in plans.items():
        facts = (written[name].survival, written[name].error) if written else (None, None)
        reports.append(LayerReport(plan.layer, name, plan.shape, plan.dtype, *facts))
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
        if name not in files:
            target = folder / name
            for parent in reversed(PurePath(name).parents):  # never the work folder anew
                (folder / parent).mkdir(exist_ok=True)
            blocks = read_blocks(source, name, allow_links=plan.allow_links)
            sha256 = write_file(target, [texts[name].encode()] if name in texts else blocks)
            files[name] = (sha256, target.stat().st_size)
    manifest = format_manifest(plan, report, tensors, files)
    write_file(folder / MANIFEST, [manifest.encode()])
