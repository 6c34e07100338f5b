"""apply: puts adapters into an existing ONNX file."""

from __future__ import annotations

from typing import Any

from ..types import Progress
from . import options
from .console import Outcome, graph_lines, verb


@verb(
    examples=(
        "apply --onnx in.onnx --bundle a.fourierft.safetensors --mode merged -o applied.onnx",
        "apply --onnx in.onnx --bundle a.fourierft.safetensors --mode swappable --base base "
        "-o tenants.onnx",
    )
)
@options.input_path(
    "--onnx", "onnx_in", required=True, metavar="IN.onnx", help="The ONNX file to adapt."
)
@options.bundles_option
@options.base_option
@options.mode_option
@options.setting_option(
    "--map",
    "mapped",
    multiple=True,
    metavar="LAYER=INITIALIZER",
    help="The initializer that holds a layer's weight, where it is not found by itself; may be "
    "repeated. INITIALIZER[START:STOP] names some outputs of a weight that holds several layers, "
    "FIRST+SECOND the parts that a layer has in the file.",
)
@options.setting_option(
    "--partial",
    is_flag=True,
    help="Leave out layers and heads that the file lacks, as where encoder and decoder are two "
    "files.",
)
@options.defaults_option
@options.setting_option(
    "--opset",
    type=int,
    metavar="N",
    help="Convert the graph to this opset first; swappable and bank need 16 or newer.",
)
@options.inline_option
@options.output_option("OUT.onnx", "The ONNX file to write.")
@options.allow_mismatch_option
@options.links_option
def apply(
    progress: Progress,
    onnx_in: str,
    bundles: tuple[str, ...],
    weights: tuple[float, ...],
    mapped: tuple[str, ...],
    output: str,
    **settings: Any,
) -> Outcome:
    """Put adapters into an existing ONNX file, without PyTorch.

    With --base, weights without names are found by their values. Quantised weights stay as they
    are, and a float branch adds the adapter (modes unmerged, swappable and bank). Run int8 files
    with the session option session.x64quantprecision = "1", as AdapterSession does.
    """
    from ..errors import UsageError
    from ..files.staging import check_output
    from ..onnx_graph.apply import apply_onnx

    wrong = [text for text in mapped if "=" not in text]
    if wrong:
        raise UsageError("--map", expected="LAYER=INITIALIZER", found=wrong[0])
    inputs = [path for path in (onnx_in, settings["base"], *bundles) if path]
    check_output(output, force=settings["force"], inputs=tuple(inputs))
    report = apply_onnx(
        onnx_in,
        bundles,
        output,
        weights=weights or None,
        mapping=dict(text.split("=", 1) for text in mapped),
        progress=progress,
        **settings,
    )
    return Outcome({"apply": report.to_dict()}, graph_lines(report), report.notes)
