"""recover: gets a bundle back out of a merged checkpoint or an ONNX file."""

from __future__ import annotations

import os
from typing import Any

import click

from ..types import Progress
from . import options
from .console import Outcome, size_text, verb


@verb(
    examples=(
        "recover --base base --merged merged --like a.fourierft.safetensors "
        "-o back.fourierft.safetensors",
        "recover --onnx unmerged.onnx -o from_onnx.fourierft.safetensors",
    )
)
@options.base_option
@options.input_path("--merged", metavar="DIR", help="--base with the adapter merged in.")
@options.input_path(
    "--onnx",
    metavar="FILE.onnx",
    help="In place of both: a file of mode unmerged, swappable or bank, or FILE.expand.onnx.",
)
@options.input_option("--adapter", metavar="NAME", help="Which adapter, if --onnx holds several.")
@options.setting_option(
    "--like",
    type=options.PATH,
    metavar="BUNDLE",
    help="A bundle or PEFT adapter directory with the same layers, entries and scaling.",
)
@options.setting_option("--seed", type=int, metavar="N", help="Without --like: entry seed.")
@options.setting_option(
    "--n-frequency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Without --like: number of coefficients of each layer.",
)
@options.setting_option(
    "--targets",
    multiple=True,
    metavar="NAME",
    help="Without --like: a layer's path or the end of it, such as q_proj; may be repeated.",
)
@options.setting_option(
    "--scaling", type=float, metavar="X", help="Without --like: scaling.  [default: 150]"
)
@options.entry_rule_option
@options.output_option("BUNDLE", "The bundle to write, by custom *.fourierft.safetensors.")
@options.links_option
def recover(
    progress: Progress,
    base: str | None,
    merged: str | None,
    onnx: str | None,
    adapter: str | None,
    output: str,
    force: bool,
    allow_links: bool,
    **settings: Any,
) -> Outcome:
    """Get a bundle back out of a merged checkpoint or ONNX file.

    From a checkpoint: the spectrum of its difference from --base. --like, or --seed, --n-frequency
    and --targets, say where the coefficients are; a difference that is not of that form is refused.
    From an ONNX file: the bundle that was exported, bit for bit.
    """
    from ..errors import UsageError
    from ..files.staging import check_output

    if onnx is not None:
        values = {"base": base, "merged": merged, **settings}.items()
        given = [f"--{name.replace('_', '-')}" for name, v in values if v not in (None, ())]
        if given:
            found, expected = ", ".join(given), "only --adapter with it: the file holds the rest"
            raise UsageError("--onnx", expected=expected, found=found)
        check_output(output, force=force, inputs=(onnx,))
        return _from_onnx(onnx, adapter, output, allow_links=allow_links, force=force)
    if base is None or merged is None:
        found = "--base only" if base else "--merged only" if merged else "neither"
        raise UsageError("recover", expected="--base and --merged, or --onnx", found=found)
    if adapter is not None:
        raise UsageError("--adapter", expected="--onnx, whose adapters have names", found="none")
    from ..recover.from_checkpoint import recover_bundle

    inputs = [path for path in (base, merged, settings["like"]) if path]
    check_output(output, force=force, inputs=tuple(inputs))
    bundle, report = recover_bundle(
        base, merged, allow_links=allow_links, progress=progress, **settings
    )
    bundle.save(output, force=force)
    worst = max(report.layers, key=lambda layer: layer.residual)
    lines = [
        f"{output}: {len(report.layers)} layers, {len(report.saved)} dense tensors, "
        f"{size_text(os.path.getsize(output))}",
        f"what the bundle leaves unexplained is at most {worst.residual:.2f} times the rounding "
        f"error of {worst.dtype} ({worst.name})",
    ]
    return Outcome({"recover": {"out": output, **report.to_dict()}}, lines, report.notes)


def _from_onnx(
    path: str, adapter: str | None, output: str, *, allow_links: bool, force: bool
) -> Outcome:
    from ..errors import UsageError
    from ..recover.from_onnx import recover_onnx

    bundles = recover_onnx(path, allow_links=allow_links)
    name = next(iter(bundles)) if adapter is None and len(bundles) == 1 else adapter
    if name not in bundles:
        found = adapter or "none"
        raise UsageError("--adapter", expected=f"one of {', '.join(bundles)}", found=found)
    bundle = bundles[name]
    bundle.save(output, force=force)
    facts = {"out": output, "adapter": name, "sha256": bundle.sha256, "layers": len(bundle.layers)}
    size = size_text(os.path.getsize(output))
    return Outcome({"recover": facts}, [f"{output}: {name}, {len(bundle.layers)} layers, {size}"])
