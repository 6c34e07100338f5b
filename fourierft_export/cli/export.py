"""export: model -> ONNX."""

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
    task_option,
    weights_option,
)


@verb
@click.option("--base", type=PATH, required=True, metavar="DIR", help="Base model directory.")
@bundles_option
@weights_option
@click.option(
    "--mode",
    type=click.Choice(["merged", "unmerged"]),
    required=True,
    help="merged: delta_W baked into the weights. unmerged: base weights and spectra, which ONNX "
    "Runtime merges once when it loads the file.",
)
@output_option("FILE.onnx", "The ONNX file to write.")
@task_option
@click.option("--opset", type=int, metavar="N", help="ONNX opset.  [default: the exporter's]")
@allow_mismatch_option
@force_option
def export(
    progress: Progress,
    base: str,
    bundles: tuple[str, ...],
    weights: tuple[float, ...],
    mode: str,
    output: str,
    task: str | None,
    opset: int | None,
    allow_base_mismatch: bool,
    force: bool,
) -> Outcome:
    """Export a base with adapters to ONNX, with dynamic batch and sequence length."""
    from ..checkpoint.staging import check_output
    from ..errors import UsageError
    from ..onnx_graph.pretrained import export_pretrained

    if weights and len(weights) != len(bundles):
        raise UsageError(
            "--weight", expected=f"one for each of {len(bundles)} bundles", found=str(len(weights))
        )
    check_output(output, force=force, inputs=(base, *bundles))
    report = export_pretrained(
        base,
        [read_bundle(path) for path in bundles],
        output,
        mode=mode,
        weights=weights or None,
        task=task,
        opset=opset,
        allow_base_mismatch=allow_base_mismatch,
        force=force,
        progress=progress,
    )
    return Outcome(
        {"export": report.to_dict()},
        [
            f"{output}: {mode}, opset {report.opset}, {report.nodes} nodes, "
            f"{size_text(report.bytes)}",
            f"  inputs: {', '.join(report.inputs)}; outputs: {', '.join(report.outputs)}",
        ],
        report.notes,
    )
