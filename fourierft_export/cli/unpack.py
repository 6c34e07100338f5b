"""unpack: writes a bundle as a PEFT adapter directory."""

from __future__ import annotations

import click

from . import options
from .console import Outcome, verb


@verb(examples=("unpack a.fourierft.safetensors -o peft",))
@click.argument("bundle", type=options.PATH)
@options.output_option("DIR", "The PEFT adapter directory to write.")
def unpack(bundle: str, output: str, force: bool) -> Outcome:
    """Write a bundle as a directory that PEFT loads, bit for bit."""
    from ..bundle.peft import open_bundle, to_peft
    from ..files.staging import check_output

    check_output(output, force=force, inputs=(bundle,))
    opened = open_bundle(bundle)
    to_peft(opened, output, force=force)
    return Outcome(
        {"output": output, "layers": len(opened.layers), "saved": sorted(opened.saved)},
        [f"{output}: {len(opened.layers)} layers, {len(opened.saved)} dense tensors"],
    )
