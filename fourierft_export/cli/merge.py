"""merge: checkpoint + bundles -> checkpoint."""

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
@options.weights_option
@options.setting_option(
    "--dtype",
    type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
    default="keep",
    show_default=True,
    help="Of the float weights that are written.",
)
@options.setting_option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME",
    help="Names of the labels of a head that the bundles bring, in order; may be repeated.",
)
@options.setting_option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Write weight files in this many processes; 0 for this one alone.",
)
@options.setting_option(
    "--scheduler",
    metavar="tcp://HOST:PORT",
    help="Write weight files by a Dask cluster that sees the same files.",
)
@options.output_option("DIR", "The model directory")
@options.force_option
@options.check_option(
    "--dry-run", is_flag=True, help="Check everything, write nothing; say what it needs."
)
@options.allow_mismatch_option
@options.links_option
def merge(
    progress: Progress,
    base: str,
    bundles: tuple[str, ...],
    weights: tuple[float, ...],
    output: str,
    labels: tuple[str, ...],
    dry_run: bool,
    force: bool,
    **settings: Any,
) -> Outcome:
    """Merge adapters into a checkpoint; the result needs nothing but transformers to load.

    After a kill, the same command goes on where it was. The manifest.json of the output says what
    it was made of, and verify checks it; where the base is a single file, so is the output, and it
    has none.
    """
    from ..files.staging import check_output
    from ..merge.merge import merge_checkpoint
    from ..merge.report import least_survival

    if not dry_run:
        check_output(output, force=force, inputs=(base, *bundles))
    report = merge_checkpoint(
        base,
        bundles,
        output,
        weights=weights or None,
        labels=labels or None,
        force=force,
        dry_run=dry_run,
        progress=progress,
        **settings,
    )
    did = "would change" if dry_run else "changed"
    line = f"{output}: {did} {len(report.layers)} layers, {size_text(report.nbytes)} of weights"
    if report.added or report.replaced:
        line += f", {len(report.added)} tensors added, {len(report.replaced)} replaced"
    lines = [line]
    least = least_survival(report.layers)
    if least is not None and least.survival is not None:
        share, where = math.floor(100 * least.survival), f"{least.name}, {least.dtype}"
        lines.append(f"at least {share}% of each layer's weights changed (least: {where})")
    if dry_run:
        lines.append(
            f"needs {size_text(report.disk_bytes)} of space and about "
            f"{size_text(report.memory_bytes)} of memory"
        )
    if report.resumed:
        lines.append(f"{len(report.resumed)} weight files were there from a run that was killed")
    return Outcome({"merge": report.to_dict()}, lines, report.notes)
