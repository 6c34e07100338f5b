"""unpack: writes a bundle as a PEFT adapter directory."""

from __future__ import annotations

import click

from ..types import Progress
from . import options
from .console import Outcome, verb


@verb(
    examples=(
        "unpack a.fourierft.safetensors -o peft",
        "unpack a.fourierft.safetensors --to lora --rank 16 -o lora",
    )
)
@click.argument("bundle", type=options.PATH)
@options.input_path(
    "--base", metavar="DIR", help="For lora: the base, if the bundle is not bound to it."
)
@options.setting_option(
    "--rank", type=int, metavar="R", help="For lora: the rank of every layer's approximation."
)
@options.setting_option(
    "--max-error",
    type=float,
    metavar="E",
    help="For lora: take the smallest rank by which |delta_W - B A| / |delta_W| is at most this.",
)
@options.output_option("DIR", "The PEFT adapter directory to write.")
@options.output_section(
    "--to",
    "target",
    type=click.Choice(["peft", "lora"]),
    default="peft",
    show_default=True,
    help="peft: the FourierFT adapter, bit for bit. lora: an approximation, for servers that know "
    "LoRA only.",
)
def unpack(
    bundle: str,
    output: str,
    base: str | None,
    target: str,
    rank: int | None,
    max_error: float | None,
    force: bool,
    progress: Progress,
) -> Outcome:
    """Write a bundle as a directory that PEFT loads, or as LoRA."""
    from ..bundle.peft import open_bundle, to_peft
    from ..bundle.to_lora import to_lora
    from ..errors import UsageError
    from ..files.staging import check_output

    check_output(output, force=force, inputs=tuple(path for path in (bundle, base) if path))
    if target == "peft":
        if base is not None or rank is not None or max_error is not None:
            found = "--to peft, which keeps everything"
            raise UsageError("--base, --rank, --max-error", expected="--to lora", found=found)
        opened = open_bundle(bundle)
        to_peft(opened, output, force=force)
        return Outcome(
            {"output": output, "layers": len(opened.layers), "saved": sorted(opened.saved)},
            [f"{output}: {len(opened.layers)} layers, {len(opened.saved)} dense tensors"],
        )
    opened = open_bundle(bundle, bind=base is None)
    opened = opened if base is None else opened.bind(base)
    report = to_lora(opened, output, rank=rank, max_error=max_error, force=force, progress=progress)
    lines = [
        f"  {layer.name}: rank {report.rank} of {layer.full_rank} keeps {layer.kept:.1%} of the "
        f"energy, as written {layer.measured:.1%}"
        for layer in report.layers
    ]
    more = [f"  ... and {len(lines) - 20} more layers (see --json)"] if len(lines) > 20 else []
    whole = max(layer.full_rank for layer in report.layers)
    total = (
        f"{output}: LoRA of rank {report.rank}, keeps {report.kept:.1%} of the energy of delta_W, "
        f"as written {report.measured:.1%} (relative error {report.error:.3f})"
    )
    notes = []
    if report.measured < 0.95:
        notes.append(
            f"much of the adapter is lost: scattered coefficients make matrices of high rank (here "
            f"up to {whole}); merge the bundle, or export it to ONNX, to keep all of it"
        )
    facts = [vars(layer) for layer in report.layers]
    data = {"output": output, "to": "lora", "rank": report.rank, "kept": report.kept}
    data |= {"measured": report.measured, "error": report.error, "layers": facts}
    return Outcome(data, [total, *lines[:20], *more], notes)
