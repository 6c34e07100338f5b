"""export: writes a base with adapters as ONNX."""

from __future__ import annotations

from typing import Any

import click

from ..types import Progress
from . import options
from .console import Outcome, graph_lines, verb


@verb(
    examples=(
        "export --base base --bundle a.fourierft.safetensors --mode unmerged -o unmerged.onnx",
        "export --base base --bundle a.fourierft.safetensors --mode swappable --defaults base "
        "-o swappable.onnx",
    )
)
@options.required_base_option
@options.bundles_option
@options.mode_option
@options.defaults_option
@options.task_option
@options.setting_option(
    "--cache",
    is_flag=True,
    help="For text-generation: add the key-value cache as inputs past_key_values.N.key and .value "
    "and outputs present.N.key and .value.",
)
@options.setting_option(
    "--genai",
    is_flag=True,
    help="For text-generation: add the cache, and write what onnxruntime-genai needs to run the "
    "output's folder: genai_config.json and the tokenizer.",
)
@options.setting_option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the weights and of the computation.",
)
@options.setting_option(
    "--opset", type=int, metavar="N", help="ONNX opset.  [default: as torch.onnx chooses]"
)
@options.setting_option(
    "--ir-version",
    type=int,
    metavar="N",
    help="Version of the ONNX file format, for older readers.  [default: 10, or what the opset "
    "needs]",
)
@options.inline_option
@options.output_option("FILE.onnx", "The ONNX file to write.")
@options.allow_mismatch_option
def export(
    progress: Progress,
    base: str,
    bundles: tuple[str, ...],
    weights: tuple[float, ...],
    output: str,
    **settings: Any,
) -> Outcome:
    """Export a base with adapters to ONNX.

    Batch size and sequence length are dynamic.
    """
    from ..files.staging import check_output
    from ..onnx_graph.trace.pretrained import export_pretrained

    check_output(output, force=settings["force"], inputs=(base, *bundles))
    report = export_pretrained(
        base, bundles, output, weights=weights or None, progress=progress, **settings
    )
    return Outcome({"export": report.to_dict()}, graph_lines(report), report.notes)
