"""export: model -> ONNX."""

from __future__ import annotations

import click

from ..types import Progress
from .console import Outcome, graph_lines, verb
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
    type=click.Choice(["merged", "unmerged", "swappable", "paired", "bank"]),
    required=True,
    help="merged: delta_W baked into the weights. unmerged: base weights and spectra, which ONNX "
    "Runtime merges once when it loads the file. swappable: the adapter is an input of a few KB. "
    "paired: the adapted weights are inputs, which FILE.expand.onnx makes of an adapter. bank: a "
    "table of adapters, and adapter_id per row of the batch, 0 being the base.",
)
@click.option(
    "--defaults",
    type=click.Choice(["bundle", "base", "required"]),
    default="bundle",
    show_default=True,
    help="swappable, paired, bank: what counts when no adapter is fed; required: one must be, as "
    "for onnxruntime-node, which ignores what is fed to inputs that have a default.",
)
@output_option("FILE.onnx", "The ONNX file to write.")
@task_option
@click.option(
    "--cache",
    is_flag=True,
    help="text-generation: with the key-value cache as inputs past_key_values.N.key and .value and "
    "outputs present.N.key and .value.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights and of the computation.",
)
@click.option("--opset", type=int, metavar="N", help="ONNX opset.  [default: the exporter's]")
@click.option(
    "--ir-version",
    type=int,
    metavar="N",
    help="Version of the ONNX file format, for older readers.  [default: 10, or what the opset "
    "needs]",
)
@click.option(
    "--inline",
    is_flag=True,
    help="No model-local functions: standard operators only, for tools that cannot read functions.",
)
@allow_mismatch_option
@force_option
def export(
    progress: Progress,
    base: str,
    bundles: tuple[str, ...],
    weights: tuple[float, ...],
    mode: str,
    defaults: str,
    output: str,
    task: str | None,
    cache: bool,
    dtype: str,
    opset: int | None,
    ir_version: int | None,
    inline: bool,
    allow_base_mismatch: bool,
    force: bool,
) -> Outcome:
    """Export a base with adapters to ONNX, with dynamic batch and sequence length."""
    from ..files.staging import check_output
    from ..onnx_graph.trace.pretrained import export_pretrained

    check_output(output, force=force, inputs=(base, *bundles))
    report = export_pretrained(
        base,
        [read_bundle(path) for path in bundles],
        output,
        mode=mode,
        weights=weights or None,
        task=task,
        cache=cache,
        dtype=dtype,
        opset=opset,
        ir_version=ir_version,
        inline=inline,
        defaults=defaults,
        allow_base_mismatch=allow_base_mismatch,
        force=force,
        progress=progress,
    )
    return Outcome({"export": report.to_dict()}, graph_lines(report), report.notes)
