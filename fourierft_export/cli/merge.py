"""merge: checkpoint + bundles -> checkpoint."""

from __future__ import annotations

import click

from .console import Outcome, Progress, size_text, verb
from .options import (
    PATH,
    allow_mismatch_option,
    bundles_option,
    force_option,
    output_option,
    read_bundle,
    weights_option,
)


@verb
@click.option("--base", type=PATH, required=True, metavar="DIR", help="Base model directory.")
@bundles_option
@weights_option
@output_option("DIR", "The model directory to write.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
    default="keep",
    show_default=True,
    help="Of the float weights that are written.",
)
@allow_mismatch_option
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@force_option
def merge(
    progress: Progress,
    base: str,
    bundles: tuple[str, ...],
    weights: tuple[float, ...],
    output: str,
    dtype: str,
    allow_base_mismatch: bool,
    dry_run: bool,
    force: bool,
) -> Outcome:
    """Merge adapters into a checkpoint; the result needs nothing but transformers to load."""
    from ..checkpoint.staging import check_output
    from ..errors import UsageError
    from ..merge.merge import merge_checkpoint

    if weights and len(weights) != len(bundles):
        raise UsageError(
            "--weight", expected=f"one for each of {len(bundles)} bundles", found=str(len(weights))
        )
    if not dry_run:
        check_output(output, force=force, inputs=(base, *bundles))
    report = merge_checkpoint(
        base,
        [read_bundle(path) for path in bundles],
        output,
        weights=weights or None,
        dtype=dtype,
        force=force,
        dry_run=dry_run,
        allow_base_mismatch=allow_base_mismatch,
        progress=progress,
    )
    did = "would change" if dry_run else "changed"
    line = f"{output}: {did} {len(report.layers)} layers, {size_text(report.nbytes)} of weights"
    if report.added or report.replaced:
        line += f", {len(report.added)} tensors added, {len(report.replaced)} replaced"
    return Outcome({"merge": report.to_dict()}, [line], report.notes)
