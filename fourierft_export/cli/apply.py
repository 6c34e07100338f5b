"""apply: existing ONNX + bundles -> ONNX."""

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
@options.input_option(
    "--onnx",
    "onnx_in",
    type=options.PATH,
    required=True,
    metavar="IN.onnx",
    help="The model to adapt.",
)
@options.bundles_option
@options.weights_option
@options.base_option
@options.mode_option
@options.setting_option(
    "--map",
    "mapped",
    multiple=True,
    metavar="LAYER=INITIALIZER",
    help="Where a layer's weight is, when it is not found; INITIALIZER[START:STOP] for some "
    "outputs of a packed weight. May be repeated.",
)
@options.output_option("OUT.onnx", "The ONNX file")
@options.force_option
@options.allow_mismatch_option
@options.links_option
def apply(
    progress: Progress,
    onnx_in: str,
    bundles: tuple[str, ...],
    weights: tuple[float, ...],
    base: str | None,
    mapped: tuple[str, ...],
    output: str,
    force: bool,
    **settings: Any,
) -> Outcome:
    """Put adapters into an ONNX file that other tools made; PyTorch is not needed.

    Quantised weights get a float branch (unmerged, swappable, bank). Run int8 files with the
    session option session.x64quantprecision = "1", as AdapterSession does.
    """
    from ..errors import UsageError
    from ..files.staging import check_output
    from ..onnx_graph.apply import apply_onnx

    wrong = [text for text in mapped if "=" not in text]
    if wrong:
        raise UsageError("--map", expected="LAYER=INITIALIZER", found=wrong[0])
    check_output(output, force=force, inputs=(onnx_in, *bundles, *([base] if base else [])))
    report = apply_onnx(
        onnx_in,
        bundles,
        output,
        weights=weights or None,
        base=base,
        mapping=dict(text.split("=", 1) for text in mapped),
        force=force,
        progress=progress,
        **settings,
    )
    return Outcome({"apply": report.to_dict()}, graph_lines(report), report.notes)
