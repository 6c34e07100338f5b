"""`merge_checkpoint`: checkpoint + bundles -> checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.combine import checked_weights
from ..bundle.fit import check_fits
from ..bundle.peft import BundleSource, list_bundles, open_bundle
from ..errors import UsageError
from ..files.hashed_write import check_space
from ..files.hub import local_model
from ..files.staging import check_output
from ..models.base_tensors import open_base
from ..types import Progress
from .base_files import MANIFEST, hash_file, measure_file, sort_files
from .changes import collect_changes, fit_bundle, make_config
from .executors import OpenExecutor, connect_dask, start_processes
from .plan import (
    DTYPES,
    MergePlan,
    check_memory,
    estimate_memory,
    list_changed_tensors,
    plan_shards,
)
from .report import BundleReport, MergeReport
from .run import report_layers, run_merge

# Headers, config, index and manifest, on top of what is counted byte by byte.
SMALL_FILES = 1 << 20


def merge_checkpoint(
    base: str | os.PathLike[str],
    bundles: Sequence[BundleSource] | BundleSource,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "keep",
    labels: Sequence[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    allow_base_mismatch: bool = False,
    allow_links: bool = False,
    workers: int = 0,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges adapters into a checkpoint; the result is a plain model without this package.

    W' = W + sum of weight_i * delta_W_i, computed in float32 or better and rounded once. Heads and
    biases that the adapters have replace the base's, or are added. The output is absent or
    complete; after a kill, the same call resumes and ends with the same bytes. Peak memory is about
    three of the largest tensor that changes, whatever the checkpoint's size. A folder gets a
    manifest.json, which `verify_merged` checks; a single file has none.

    Args:
        base: a Hugging Face folder (one safetensors file or shards), or one safetensors file.
        bundles: one or several; each a `Bundle`, or the path of a bundle file or of a PEFT adapter
            directory.
        out: the folder to make; a file, when `base` is a file.
        weights: a factor on each bundle's delta_W; 1 by default.
        dtype: "keep", "float32", "float16" or "bfloat16", for all float tensors.
        labels: names of a classification head's labels, for config.json.
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

    Example:
        >>> import fourierft_export as ff, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> model, folder = torch.nn.Sequential(torch.nn.Linear(8, 4)), tempfile.mkdtemp()
        >>> save_file(model.state_dict(), folder + "/base.safetensors")
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> bundle = ff.capture(ff.inject(model, config))
        >>> merged = folder + "/merged.safetensors"
        >>> report = ff.merge_checkpoint(folder + "/base.safetensors", bundle, merged)
        >>> [(layer.tensor, layer.shape) for layer in report.layers]
        [('0.weight', (4, 8))]
    """
    given = list_bundles(bundles)
    factors = checked_weights(weights, len(given))
    _check_options(given, dtype, workers, scheduler)
    target = check_output(out, force=force, inputs=(base, *given))
    # The workers of a cluster may have another working directory.
    base = local_model(base)
    opened = open_base(os.path.abspath(base) if scheduler else base, allow_links=allow_links)
    is_folder = opened.directory.is_dir()
    loaded = [open_bundle(source) for source in given]
    called = [
        f"bundle {number} (given as an object)" if isinstance(source, Bundle) else os.fspath(source)
        for number, source in enumerate(given, 1)
    ]
    fits = []
    for number, (name, bundle) in enumerate(zip(called, loaded, strict=True), 1):
        fits.append(fit_bundle(opened, name, bundle, thorough=dry_run))
        if progress:
            progress("checking the base", number, len(loaded))
    check_fits(opened.directory, fits, allow_base_mismatch=allow_base_mismatch)
    if is_folder == target.name.endswith(".safetensors"):
        raise UsageError(
            target,
            expected="a folder" if is_folder else "a file that ends in .safetensors",
            found="a .safetensors file" if is_folder else "another name",
            remedy="the output is what the base is: a folder, or one file",
        )
    bound = [replace(bundle, spec=fit.spec) for bundle, fit in zip(loaded, fits, strict=True)]
    changes = collect_changes(opened, bound, called, factors)
    shards = plan_shards(opened, changes, dtype)
    config, notes = make_config(opened, bound, factors, changes, dtype, labels)
    weight_files = (*opened.checkpoint.shards, opened.checkpoint.index or Path())
    copied, stale = sort_files(opened.directory, weight_files) if is_folder else ((), ())
    sizes = [measure_file(opened.directory, name, allow_links=allow_links) for name in copied]
    replaced = [key for key, plan in changes.tensors.items() if plan.value is not None]
    nbytes = sum(shard.nbytes for shard in shards)
    report = MergeReport(
        out=target,
        base=Path(os.path.abspath(opened.directory)),
        dtype=dtype,
        bundles=tuple(
            BundleReport(name, bundle.sha256, factor, len(bundle.layers), fit.verdict)
            for name, bundle, factor, fit in zip(called, loaded, factors, fits, strict=True)
        ),
        layers=report_layers(list_changed_tensors(shards)),
        replaced=tuple(map(changes.out_name, sorted({*replaced} & {*opened.tensors}))),
        added=tuple(map(changes.out_name, sorted({*changes.tensors} - {*opened.tensors}))),
        carried=copied,
        left_behind=stale,
        nbytes=nbytes,
        disk_bytes=nbytes + sum(sizes) + SMALL_FILES,
        memory_bytes=estimate_memory(shards),
        notes=notes if is_folder else (*notes, "a single file has no manifest.json"),
    )
    own_manifest = None
    if MANIFEST in stale:
        own_manifest, _ = hash_file(opened.directory, MANIFEST, allow_links=allow_links)
    plan = MergePlan(
        base=opened,
        fits=tuple(fits),
        shards=shards,
        config=config,
        base_manifest=own_manifest,
        report=report,
        allow_links=allow_links,
        allow_base_mismatch=allow_base_mismatch,
    )
    workers = min(workers, len(shards))
    if scheduler is None:  # a cluster's memory is another machine's
        check_memory(report.memory_bytes, max(workers, 1))
    if dry_run:
        check_space(target.parent, report.disk_bytes)
        return replace(plan.with_fits(fits).report, dry_run=True)
    executor: OpenExecutor | None = None
    if scheduler is not None:
        executor = partial(connect_dask, scheduler)
    elif workers:
        executor = partial(start_processes, workers)
    return run_merge(plan, executor, force=force, progress=progress)


def _check_options(
    given: Sequence[BundleSource],
    dtype: str,
    workers: int,
    scheduler: str | None,
) -> None:
    if not given:
        raise UsageError("bundles", expected="one or more", found="none")
    if dtype != "keep" and dtype not in DTYPES:
        raise UsageError("dtype", expected=f"keep, {', '.join(DTYPES)}", found=repr(dtype))
    if workers < 0 or (workers and scheduler is not None):
        raise UsageError(
            "workers",
            expected="a number of processes, or a scheduler",
            found=f"workers {workers}, scheduler {scheduler}",
        )
