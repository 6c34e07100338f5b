"""merge: writes a checkpoint with bundles merged in."""

from __future__ import annotations

import math
from typing import Any

import click

from ..types import Progress
from . import options
from .console import Outcome, size_text, verb


@verb(
    examples=(
        "merge --base base --bundle a.fourierft.safetensors -o merged",
        "merge --base base --bundle a.fourierft.safetensors --dtype bfloat16 --dry-run -o small",
        "merge --base base --bundle a.fourierft.safetensors --weight 0.7 "
        "--bundle b.fourierft.safetensors --weight 0.3 -o blend",
    )
)
@options.required_base_option
@options.bundles_option
@options.setting_option(
    "--dtype",
    type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
    default="keep",
    show_default=True,
    help="Type of the float weights that are written.",
)
@options.setting_option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME",
    help="Name of a label, if the bundles hold a classification head; repeat it for each label, "
    "in order.",
)
@options.setting_option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Write weight files in this many worker processes.",
)
@options.setting_option(
    "--scheduler",
    metavar="tcp://HOST:PORT",
    help="Write weight files on a Dask cluster that has the same file system.",
)
@options.output_option("DIR", "The model directory to write.")
@options.check_option(
    "--dry-run", is_flag=True, help="Check everything, report space and memory, write nothing."
)
@options.allow_mismatch_option
@options.links_option
def merge(
    progress: Progress,
    output: str,
    weights: tuple[float, ...],
    labels: tuple[str, ...],
    dry_run: bool,
    **settings: Any,
) -> Outcome:
    """Merge adapters into a checkpoint, for transformers to load.

    After a kill, the same command continues where it stopped. The output's manifest.json records
    its inputs and hashes, which verify checks. A base that is a single file gives a single file,
    without a manifest.
    """
    from ..merge.merge import merge_checkpoint
    from ..merge.report import find_least_survival

    report = merge_checkpoint(
        out=output,
        weights=weights or None,
        labels=labels or None,
        dry_run=dry_run,
        progress=progress,
        **settings,
    )
    did = "would change" if dry_run else "changed"
    line = f"{output}: {did} {len(report.layers)} layers, {size_text(report.nbytes)} of weights"
    if report.added or report.replaced:
        line += f", {len(report.added)} tensors added, {len(report.replaced)} replaced"
    lines = [line]
    least = find_least_survival(report.layers)
    if least is not None and least.survival is not None:
        share, where = math.floor(100 * least.survival), f"{least.name}, {least.dtype}"
        lines.append(f"at least {share}% of each layer's weights changed (least: {where})")
    if dry_run:
        lines.append(
            f"needs {size_text(report.disk_bytes)} of space and about "
            f"{size_text(report.memory_bytes)} of memory"
        )
    if report.resumed:
        lines.append(f"{len(report.resumed)} weight files kept from a run that was killed")
    return Outcome({"merge": report.to_dict()}, lines, report.notes)
