"""apply: existing ONNX + bundles -> ONNX."""

from __future__ import annotations

import click

from ..types import Progress
from .console import Outcome, graph_lines, verb
from .options import (
    PATH,
    allow_mismatch_option,
    base_option,
    bundles_option,
    force_option,
    output_option,
    read_bundle,
    weights_option,
)


@verb
@click.option(
    "--onnx", "onnx_in", type=PATH, required=True, metavar="IN.onnx", help="The model to adapt."
)
@bundles_option
@weights_option
@click.option(
    "--mode",
    type=click.Choice(["merged", "unmerged", "swappable", "paired", "bank"]),
    required=True,
    help="merged: delta_W baked into the weights. unmerged: base weights and spectra, which ONNX "
    "Runtime merges once when it loads the file. swappable: the adapter as graph inputs. paired: "
    "the weights as inputs, and FILE.expand.onnx that makes them. bank: a table of adapters, and "
    "adapter_id per row. Quantised weights get a float branch (unmerged, swappable, bank); run "
    'int8 files with the session option session.x64quantprecision = "1", as AdapterSession does.',
)
@base_option
@click.option(
    "--map",
    "mapped",
    multiple=True,
    metavar="LAYER=INITIALIZER",
    help="Where a layer's weight is, when it is not found; INITIALIZER[START:STOP] for some "
    "outputs of a packed weight. May be repeated.",
)
@output_option("OUT.onnx", "The ONNX file to write.")
@allow_mismatch_option
@click.option(
    "--allow-links", is_flag=True, help="Follow links of external data within the model's folder."
)
@force_option
def apply(
    progress: Progress,
    onnx_in: str,
    bundles: tuple[str, ...],
    weights: tuple[float, ...],
    mode: str,
    base: str | None,
    mapped: tuple[str, ...],
    output: str,
    allow_base_mismatch: bool,
    allow_links: bool,
    force: bool,
) -> Outcome:
    """Put adapters into an ONNX file that other tools made; PyTorch is not needed."""
    from ..errors import UsageError
    from ..files.staging import check_output
    from ..onnx_graph.apply import apply_onnx

    wrong = [text for text in mapped if "=" not in text]
    if wrong:
        raise UsageError("--map", expected="LAYER=INITIALIZER", found=wrong[0])
    inputs = (onnx_in, *bundles) if base is None else (onnx_in, base, *bundles)
    check_output(output, force=force, inputs=inputs)
    report = apply_onnx(
        onnx_in,
        [read_bundle(path) for path in bundles],
        output,
        mode=mode,
        weights=weights or None,
        base=base,
        mapping=dict(text.split("=", 1) for text in mapped),
        allow_base_mismatch=allow_base_mismatch,
        allow_links=allow_links,
        force=force,
        progress=progress,
    )
    return Outcome({"apply": report.to_dict()}, graph_lines(report), report.notes)
