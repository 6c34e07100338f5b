"""recover: merged checkpoint - base -> bundle."""

from __future__ import annotations

import os

import click

from .console import Outcome, Progress, size_text, verb
from .options import PATH, force_option, links_option, output_option, read_bundle


@verb
@click.option("--base", type=PATH, required=True, metavar="DIR", help="What was merged into.")
@click.option("--merged", type=PATH, required=True, metavar="DIR", help="What came out.")
@output_option("BUNDLE", "The bundle to write, *.fourierft.safetensors by custom.")
@click.option(
    "--like",
    type=PATH,
    metavar="BUNDLE",
    help="A bundle, or a PEFT adapter directory, of the same layers, entries and scaling.",
)
@click.option("--seed", type=int, help="Of the entries, without --like.")
@click.option("--n-frequency", type=click.IntRange(min=1), help="Coefficients of each layer.")
@click.option(
    "--targets",
    multiple=True,
    metavar="NAME",
    help="Layers, by their paths or the ends of them, such as q_proj; may be repeated.",
)
@click.option("--scaling", type=float, default=150.0, show_default=True, help="To divide by.")
@click.option(
    "--entry-rule",
    type=click.Choice(["small", "r64"]),
    help="How the seed gave the entries.  [default: what torch does today]",
)
@links_option
@force_option
def recover(
    progress: Progress,
    base: str,
    merged: str,
    output: str,
    like: str | None,
    seed: int | None,
    n_frequency: int | None,
    targets: tuple[str, ...],
    scaling: float,
    entry_rule: str | None,
    allow_links: bool,
    force: bool,
) -> Outcome:
    """Get the bundle back out of a merged checkpoint: the spectrum of what was added to its base.

    Either --like, or --seed, --n-frequency and --targets, say where the coefficients are. A
    difference that no FourierFT adapter with these entries makes is refused.
    """
    from ..checkpoint.staging import check_output
    from ..merge.recover import recover_bundle

    inputs = (base, merged, *([like] if like else []))
    check_output(output, force=force, inputs=inputs)
    bundle, report = recover_bundle(
        base,
        merged,
        like=read_bundle(like) if like else None,
        seed=seed,
        n_frequency=n_frequency,
        targets=targets,
        scaling=scaling,
        entry_rule=entry_rule,
        allow_links=allow_links,
        progress=progress,
    )
    bundle.save(output, force=force)
    worst = max(report.layers, key=lambda layer: layer.residual)
    lines = [
        f"{output}: {len(report.layers)} layers, {len(report.saved)} dense tensors, "
        f"{size_text(os.path.getsize(output))}",
        f"what is left of the difference is {worst.residual:.2f} times what rounding to "
        f"{worst.dtype} leaves, at most ({worst.name})",
    ]
    return Outcome({"recover": {"out": output, **report.to_dict()}}, lines, report.notes)
