"""`merge_checkpoint`: checkpoint + bundles -> checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..bundle.combine import checked_weights
from ..bundle.file import Bundle
from ..errors import UsageError
from ..files.staging import check_output
from ..files.write import check_space
from ..models.base import Base, open_base
from ..types import Progress
from . import carry
from .changes import collect
from .check import Checked, check
from .config import merged_config
from .estimate import SMALL_FILES, check_memory, memory_needed
from .executors import OpenExecutor, dask_cluster, local_processes
from .job import Job
from .plan import DTYPES, lay_out, out_name
from .report import MergeReport
from .run import carry_out, layer_reports, with_verdicts

Source = str | os.PathLike[str] | Bundle


def merge_checkpoint(
    base: str | os.PathLike[str],
    bundles: Sequence[Source] | Source,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "keep",
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    allow_base_mismatch: bool = False,
    allow_links: bool = False,
    workers: int = 0,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Add adapters to a checkpoint: a plain model, which needs nothing of this package.

    W' = W + sum of weight_i * delta_W_i, computed in float32 or better and rounded once. Heads and
    biases that the adapters carry replace the base's, or are added. The output is absent or
    complete; after a kill, the same call goes on where it was and ends with the same bytes. Peak
    memory is about three of the largest tensor that changes, whatever the checkpoint's size. A
    folder gets a manifest.json, which `verify_merged` checks; a single file has none.

    Args:
        base: a Hugging Face folder (one safetensors file or shards), or one safetensors file.
        bundles: paths of bundles, or `Bundle` objects; one or several.
        out: the folder to make; a file, when `base` is a file.
        weights: a factor on each bundle's delta_W; 1 by default.
        dtype: "keep", "float32", "float16" or "bfloat16", for all float tensors.
        labels: names of a classification head's labels, for config.json.
        names: how to speak of the bundles, in errors and in the manifest, which has the last part
            of each; their paths by default, and numbers for objects.
        force: replace an existing output.
        dry_run: check and plan only.
        allow_base_mismatch: merge even when the base's values are not those the adapter knows.
        allow_links: follow links between files of the base's folder.
        workers: write weight files in this many processes; 0 for this one alone.
        scheduler: write them by a Dask cluster, whose workers see the same files: its address.
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
    if workers < 0 or (workers and scheduler is not None):
        raise UsageError(
            "workers",
            expected="a number of processes, or a scheduler",
            found=f"workers {workers}, scheduler {scheduler}",
        )
    paths = [source for source in given if not isinstance(source, Bundle)]
    target = check_output(out, force=force, inputs=(base, *paths))
    opened = open_base(base, allow_links=allow_links)
    named = [
        (name, source if isinstance(source, Bundle) else Bundle.load(source), factor)
        for name, source, factor in zip(_names(given, names), given, factors, strict=True)
    ]
    checked = check(
        opened,
        named,
        allow_base_mismatch=allow_base_mismatch,
        thorough=dry_run,
        progress=progress,
    )
    job = _plan(opened, checked, target, dtype, labels, allow_links, allow_base_mismatch)
    workers = min(workers, len(job.shards))
    if scheduler is None:  # a cluster's memory is another machine's
        check_memory(job.report.memory_bytes, max(workers, 1))
    if dry_run:
        check_space(target.parent, job.report.disk_bytes)
        return replace(with_verdicts(job.report, checked), dry_run=True)
    executor: OpenExecutor | None = None
    if scheduler is not None:
        executor = partial(dask_cluster, scheduler)
    elif workers:
        executor = partial(local_processes, workers)
    return carry_out(job, executor, force=force, progress=progress)


def _checked_options(
    given: Sequence[Source], weights: Sequence[float] | None, dtype: str
) -> tuple[float, ...]:
    """The weights, once the options make sense."""
    if not given:
        raise UsageError("bundles", expected="one or more", found="none")
    if dtype != "keep" and dtype not in DTYPES:
        raise UsageError("dtype", expected=f"keep, {', '.join(DTYPES)}", found=repr(dtype))
    return checked_weights(weights, len(given))


def _names(given: Sequence[Source], names: Sequence[str] | None) -> Sequence[str]:
    if names is not None and len(names) != len(given):
        raise UsageError(
            "names", expected=f"{len(given)}, one for each bundle", found=str(len(names))
        )
    return names or [
        f"bundle {number} (given as an object)" if isinstance(source, Bundle) else str(source)
        for number, source in enumerate(given, 1)
    ]


def _plan(
    base: Base,
    checked: tuple[Checked, ...],
    target: Path,
    dtype: str,
    labels: Sequence[str] | None,
    allow_links: bool,
    allow_base_mismatch: bool,
) -> Job:
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
    carried = sum(
        carry.file_size(base.directory, name, allow_links=allow_links)
        for name in companions.carried
    )
    nbytes = sum(shard.nbytes for shard in shards)
    report = MergeReport(
        out=target,
        base=Path(os.path.abspath(base.directory)),
        dtype=dtype,
        bundles=(),
        layers=layer_reports(shards),
        replaced=tuple(out_name(k, changes) for k in sorted(changes.dense) if k in base.tensors),
        added=tuple(out_name(key, changes) for key in new),
        carried=companions.carried,
        left_behind=companions.stale,
        nbytes=nbytes,
        disk_bytes=nbytes + carried + SMALL_FILES,
        memory_bytes=memory_needed(shards),
        notes=notes if is_folder else (*notes, "a single file has no manifest.json"),
    )
    return Job(
        base=base,
        checked=checked,
        shards=shards,
        config=settings,
        companions=companions,
        base_manifest=carry.manifest_sha256(base.directory, companions, allow_links=allow_links),
        report=report,
        dtype=dtype,
        allow_links=allow_links,
        allow_base_mismatch=allow_base_mismatch,
    )
