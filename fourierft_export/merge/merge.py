"""`merge_checkpoint`: checkpoint + bundles -> checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle.file import Bundle
from ..bundle.names import natural_key
from ..checkpoint.staging import check_output, staged_directory, staged_file
from ..checkpoint.write import check_space, copy_file
from ..errors import UsageError
from ..models.base import Base, open_base
from . import carry
from .changes import collect
from .check import Checked, Progress, check
from .config import merged_config
from .manifest import manifest_text
from .plan import DTYPES, OutShard, index_text, lay_out, out_name
from .report import BundleReport, LayerReport, MergeReport, survival_notes
from .shard import Count, WrittenShard, write_shard

Source = str | os.PathLike[str] | Bundle

# Headers, config, index and manifest, on top of what is counted byte by byte.
_SMALL_FILES = 1 << 20


@dataclass(frozen=True)
class _Job:
    """A merge that has been checked and laid out; nothing is written yet."""

    base: Base
    shards: tuple[OutShard, ...]
    config: Mapping[str, Any]
    companions: carry.Companions
    report: MergeReport
    allow_base_mismatch: bool


def merge_checkpoint(
    base: str | os.PathLike[str],
    bundles: Sequence[Source] | Source,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "keep",
    labels: Sequence[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Add adapters to a checkpoint: a plain model, which needs nothing of this package.

    W' = W + sum of weight_i * delta_W_i, computed in float32 or better and rounded once. Heads and
    biases that the adapters carry replace the base's, or are added. The output is absent or
    complete. Peak memory is a few times the largest tensor that changes.

    Args:
        base: a Hugging Face folder (one safetensors file or shards), or one safetensors file.
        bundles: paths of bundles, or `Bundle` objects; one or several.
        out: the folder to make; a file, when `base` is a file.
        weights: a factor on each bundle's delta_W; 1 by default.
        dtype: "keep", "float32", "float16" or "bfloat16", for all float tensors.
        labels: names of a classification head's labels, for config.json.
        force: replace an existing output.
        dry_run: check and plan only.
        allow_base_mismatch: merge even when the base's values are not those the adapter knows.
        progress: called with (what, done, total); bytes while writing.

    Returns:
        What was done: layers with the share of weights that survived rounding, notes, hashes.

    Raises:
        UsageError: options that clash; an output that exists, or is an input.
        BadInputError: a damaged input; a weight that overflows its dtype.
        BaseMismatchError: bundles that do not belong to this base, every layer listed.
        FileAccessError: missing files, no space.
    """
    given = [bundles] if isinstance(bundles, (str, os.PathLike, Bundle)) else list(bundles)
    factors = _checked_options(given, weights, dtype)
    paths = [source for source in given if not isinstance(source, Bundle)]
    target = check_output(out, force=force, inputs=(base, *paths))
    _refuse_inside(target, Path(base))
    opened = open_base(base)
    named = [
        (str(source), Bundle.load(source), factor)
        if not isinstance(source, Bundle)
        else (f"bundle {number}", source, factor)
        for number, (source, factor) in enumerate(zip(given, factors, strict=True), 1)
    ]
    checked = check(opened, named, allow_base_mismatch=allow_base_mismatch, progress=progress)
    job = _plan(opened, checked, target, dtype, labels, allow_base_mismatch)
    carried = sum(carry.file_size(opened.directory, name) for name in job.companions.carried)
    check_space(target.parent, job.report.nbytes + carried + _SMALL_FILES)
    if dry_run:
        return replace(job.report, dry_run=True)
    if opened.directory.is_file():
        with staged_file(target, force=force) as partial:
            written = (
                write_shard(job.shards[0], partial, opened.checkpoint, _meter(job, progress)),
            )
        return _finished(job, written)
    with staged_directory(target, force=force) as partial:
        return _write_folder(job, partial, _meter(job, progress))


def _checked_options(
    given: Sequence[Source], weights: Sequence[float] | None, dtype: str
) -> tuple[float, ...]:
    """The weights, once the options make sense."""
    if not given:
        raise UsageError("bundles", expected="one or more", found="none")
    if dtype != "keep" and dtype not in DTYPES:
        raise UsageError("dtype", expected=f"keep, {', '.join(DTYPES)}", found=repr(dtype))
    factors = (1.0,) * len(given) if weights is None else tuple(float(w) for w in weights)
    if len(factors) != len(given) or not all(math.isfinite(w) for w in factors):
        raise UsageError(
            "weights",
            expected=f"{len(given)} finite numbers, one for each bundle",
            found=", ".join(map(str, factors)) or "none",
        )
    return factors


def _refuse_inside(target: Path, base: Path) -> None:
    if Path(os.path.realpath(base)) in Path(os.path.realpath(target)).parents:
        raise UsageError(
            target,
            expected="an output apart from the base",
            found=f"a place inside {base}",
            remedy="choose another output",
        )


def _plan(
    base: Base,
    checked: Sequence[Checked],
    target: Path,
    dtype: str,
    labels: Sequence[str] | None,
    allow_base_mismatch: bool,
) -> _Job:
    """Lay the output out. Reads the base's folder, writes nothing."""
    ingredients = [item.ingredient for item in checked]
    changes = collect(base, ingredients)
    shards = lay_out(base.checkpoint, changes, dtype)
    settings, notes = merged_config(base, ingredients, changes, dtype, labels)
    checkpoint = base.checkpoint
    weight_files = (*checkpoint.shards, *([checkpoint.index] if checkpoint.index else []))
    is_folder = base.directory.is_dir()
    if is_folder == target.name.endswith(".safetensors"):
        raise UsageError(
            target,
            expected="a folder" if is_folder else "a file that ends in .safetensors",
            found="a .safetensors file" if is_folder else "another name",
            remedy="the output is what the base is: a folder, or one file",
        )
    companions = (
        carry.companions(base.directory, weight_files) if is_folder else carry.Companions((), ())
    )
    new = sorted({*changes.layers, *changes.dense, *changes.aliases} - {*base.tensors})
    report = MergeReport(
        out=target,
        base=Path(os.path.abspath(base.directory)),
        dtype=dtype,
        bundles=tuple(_bundle_report(item) for item in checked),
        layers=_layer_reports(shards),
        replaced=tuple(out_name(k, changes) for k in sorted(changes.dense) if k in base.tensors),
        added=tuple(out_name(key, changes) for key in new),
        carried=companions.carried,
        left_behind=companions.stale,
        nbytes=sum(shard.nbytes for shard in shards),
        notes=tuple(note for item in checked for note in item.notes) + notes,
    )
    return _Job(base, shards, settings, companions, report, allow_base_mismatch)


def _bundle_report(item: Checked) -> BundleReport:
    name, bundle, weight, layers, _ = item.ingredient
    return BundleReport(name, bundle.sha256, weight, len(layers), item.verdict)


def _layer_reports(
    shards: Sequence[OutShard], survival: Mapping[str, float] | None = None
) -> tuple[LayerReport, ...]:
    reports = [
        LayerReport(
            tensor.change.name,
            tensor.slot.name,
            tensor.slot.shape,
            tensor.slot.dtype,
            (survival or {}).get(tensor.slot.name),
        )
        for shard in shards
        for tensor in shard.tensors
        if tensor.change is not None
    ]
    return tuple(sorted(reports, key=lambda layer: natural_key(layer.name)))


def _write_folder(job: _Job, folder: Path, count: Count) -> MergeReport:
    """Fill a staged folder."""
    checkpoint = job.base.checkpoint
    written = tuple(write_shard(s, folder / s.name, checkpoint, count) for s in job.shards)
    texts = {}
    if checkpoint.index is not None:
        texts[checkpoint.index.name] = index_text(checkpoint, job.shards)
    if job.config != job.base.config:
        texts["config.json"] = json.dumps(job.config, indent=2, sort_keys=True) + "\n"
    report = _finished(job, written)
    texts[carry.MANIFEST] = manifest_text(report, job.allow_base_mismatch)
    for name in job.companions.carried:
        if name not in texts:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            source = job.base.directory
            copy_file(place, carry.file_blocks(source, name), carry.file_size(source, name))
    for name, text in texts.items():
        copy_file(folder / name, [text.encode()], len(text))
    return report


def _finished(job: _Job, written: Sequence[WrittenShard]) -> MergeReport:
    survival = {name: share for shard in written for name, share in shard.survival.items()}
    layers = _layer_reports(job.shards, survival)
    return replace(
        job.report,
        layers=layers,
        shards={shard.name: shard.sha256 for shard in written},
        notes=(*job.report.notes, *survival_notes(layers, job.report.dtype)),
    )


def _meter(job: _Job, progress: Progress | None) -> Count:
    """A counter of bytes that reports to `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("merging", min(done, job.report.nbytes), job.report.nbytes)

    return count
