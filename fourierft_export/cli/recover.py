"""recover: merged checkpoint - base -> bundle; or ONNX file -> bundle."""

from __future__ import annotations

import os

import click

from ..types import Progress
from .console import Outcome, size_text, verb
from .options import PATH, force_option, links_option, output_option, read_bundle


@verb
@click.option("--base", type=PATH, metavar="DIR", help="What was merged into.")
@click.option("--merged", type=PATH, metavar="DIR", help="What came out.")
@click.option(
    "--onnx",
    type=PATH,
    metavar="FILE.onnx",
    help="In place of both: a file of mode unmerged, swappable or bank, or FILE.expand.onnx.",
)
@click.option("--adapter", metavar="NAME", help="Which one, of an ONNX file that holds several.")
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
@click.option("--scaling", type=float, help="To divide by, without --like.  [default: 150]")
@click.option(
    "--entry-rule",
    type=click.Choice(["small", "r64"]),
    help="How the seed gave the entries.  [default: what torch does today]",
)
@links_option
@force_option
def recover(
    progress: Progress,
    base: str | None,
    merged: str | None,
    onnx: str | None,
    adapter: str | None,
    output: str,
    like: str | None,
    seed: int | None,
    n_frequency: int | None,
    targets: tuple[str, ...],
    scaling: float | None,
    entry_rule: str | None,
    allow_links: bool,
    force: bool,
) -> Outcome:
    """Get the bundle back out of a merged checkpoint: the spectrum of what was added to its base.

    Either --like, or --seed, --n-frequency and --targets, say where the coefficients are. A
    difference that no FourierFT adapter with these entries makes is refused. With --onnx, the
    bundle that was exported, bit for bit.
    """
    from ..errors import UsageError
    from ..files.staging import check_output

    if onnx is not None:
        options = {
            "--base": base, "--merged": merged, "--like": like, "--seed": seed,
            "--n-frequency": n_frequency, "--targets": targets or None, "--scaling": scaling,
            "--entry-rule": entry_rule,
        }  # fmt: skip
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise UsageError(
                "--onnx",
                expected="nothing that says what was merged or how: the file tells",
                found=", ".join(given),
            )
        return _from_onnx(onnx, adapter, output, allow_links=allow_links, force=force)
    if base is None or merged is None:
        found = "--base only" if base else "--merged only" if merged else "neither"
        raise UsageError("recover", expected="--base and --merged, or --onnx", found=found)
    if adapter is not None:
        raise UsageError("--adapter", expected="--onnx, whose adapters have names", found="none")
    from ..recover.from_checkpoint import recover_bundle

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


def _from_onnx(
    path: str, adapter: str | None, output: str, *, allow_links: bool, force: bool
) -> Outcome:
    from ..errors import UsageError
    from ..files.staging import check_output
    from ..recover.from_onnx import recover_onnx

    check_output(output, force=force, inputs=(path,))
    bundles = recover_onnx(path, allow_links=allow_links)
    if (adapter is None and len(bundles) > 1) or (adapter is not None and adapter not in bundles):
        raise UsageError(
            "--adapter", expected=f"one of {', '.join(bundles)}", found=adapter or "none"
        )
    name = next(iter(bundles)) if adapter is None else adapter
    bundle = bundles[name]
    bundle.save(output, force=force)
    facts = {"out": output, "adapter": name, "sha256": bundle.sha256, "layers": len(bundle.layers)}
    size = size_text(os.path.getsize(output))
    return Outcome({"recover": facts}, [f"{output}: {name}, {len(bundle.layers)} layers, {size}"])
