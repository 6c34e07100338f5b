"""pack: PEFT adapter directory -> bundle."""

from __future__ import annotations

import os

import click

from .console import Outcome, size_text, verb
from .options import PATH, base_option, force_option, output_option


@verb
@click.argument("source", type=PATH)
@output_option("BUNDLE", "The bundle to write, *.fourierft.safetensors by custom.")
@base_option
@click.option("--adapter", metavar="NAME", help="Which of several adapters, by its subfolder.")
@click.option(
    "--entry-rule",
    type=click.Choice(["small", "r64"]),
    help="How the seed gave the entries; 'small' for layers above 214 million weights that were "
    "trained before torch 2.6.  [default: what torch does today]",
)
@force_option
def pack(
    source: str,
    output: str,
    base: str | None,
    adapter: str | None,
    entry_rule: str | None,
    force: bool,
) -> Outcome:
    """Pack the PEFT FourierFT adapter in SOURCE into one small, checked file.

    With --base the bundle is bound to its base: it then knows layer shapes and refuses other bases.
    """
    from ..bundle.describe import describe_bundle
    from ..bundle.peft import find_adapter, from_peft, left_out
    from ..checkpoint.staging import check_output

    check_output(output, force=force, inputs=(source, *([base] if base else [])))
    bundle = from_peft(source, base, adapter=adapter, entry_rule=entry_rule)
    bundle.save(output, force=force)
    facts = describe_bundle(bundle, output)
    folder = find_adapter(source, adapter)
    before = sum(e.stat().st_size for e in os.scandir(folder) if e.name.startswith("adapter_"))
    notes = [
        f"{name} is the base's own weight and was left out" for name in left_out(source, adapter)
    ]
    if bundle.is_bound and base is None:
        notes.append(f"bound to {bundle.spec.base_model}, the base that the adapter's config names")
    if not bundle.is_bound:
        notes.append(
            "the bundle is unbound: without --base it holds no layer shapes, and nothing can check "
            "that a base is the right one"
        )
    return Outcome(
        {"bundle": facts, "source": {"path": str(folder), "bytes": before}},
        [
            f"{output}: {facts['layers']} layers, {facts['coefficients']:,} coefficients, "
            f"{size_text(facts['bytes'])} (PEFT's files: {size_text(before)})"
        ],
        notes,
    )
