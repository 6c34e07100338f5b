"""validate: proof, or the first place that differs."""

from __future__ import annotations

from pathlib import Path

import click

from ..types import Progress
from .console import Outcome, verb
from .options import PATH, allow_mismatch_option, base_option, force_option, task_option


@verb
@base_option
@click.option("--bundle", type=PATH, metavar="BUNDLE", help="The adapter as a bundle.")
@click.option("--peft", type=PATH, metavar="DIR", help="The adapter as PEFT saved it.")
@click.option("--merged", type=PATH, metavar="DIR", help="A merged checkpoint.")
@click.option(
    "--onnx", type=PATH, multiple=True, metavar="FILE", help="An exported graph; may be repeated."
)
@click.option(
    "--inputs", type=PATH, metavar="FILE.npz", help="Inputs by name.  [default: 64 sentences]"
)
@task_option
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="[PRECISION=]X",
    help="Largest difference as a fraction of the output's largest value, such as 1e-3 or "
    "bfloat16=0.1.  [default: 1e-4 for float32]",
)
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, metavar="N")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="For ONNX Runtime.")
@click.option("--report", type=PATH, metavar="FILE.html", help="Write the report as a page.")
@allow_mismatch_option
@force_option
def validate(
    progress: Progress,
    base: str | None,
    bundle: str | None,
    peft: str | None,
    merged: str | None,
    onnx: tuple[str, ...],
    inputs: str | None,
    task: str | None,
    tolerances: tuple[str, ...],
    samples: int,
    threads: int | None,
    report: str | None,
    allow_base_mismatch: bool,
    force: bool,
) -> Outcome:
    """Run every artifact given on the same inputs and compare them pairwise.

    All adapted artifacts must agree, and must differ from the base. Exit code 5 if not.
    """
    from ..errors import ValidationError
    from ..files.staging import check_output, staged_file
    from ..proof.render import render_html, render_text
    from ..proof.validate import validate as run

    if report:
        read = (base, bundle, peft, merged, *onnx, inputs)
        check_output(report, force=force, inputs=tuple(path for path in read if path))
    found = run(
        base=base,
        bundle=bundle,
        peft=peft,
        merged=merged,
        onnx=onnx,
        inputs=inputs,
        task=task,
        tolerances=_tolerances(tolerances),
        samples=samples,
        threads=threads,
        allow_base_mismatch=allow_base_mismatch,
        progress=progress,
    )
    if report:
        with staged_file(report, force=force) as partial:
            partial.write_text(render_html(found), encoding="utf-8")
    failure = None
    try:
        found.raise_for_failure()
    except ValidationError as error:
        failure = error
    where = [f"report: {Path(report)}"] if report else []
    return Outcome(
        {"validate": found.to_dict()}, [render_text(found), *where], found.notes, failure
    )


def _tolerances(words: tuple[str, ...]) -> dict[str, float]:
    """`1e-3` (for float32) and `bfloat16=0.1` as a mapping."""
    values = {}
    for word in words:
        precision, _, value = word.rpartition("=")
        try:
            values[precision or "float32"] = float(value)
        except ValueError:
            raise click.BadParameter(
                f"{word!r} is not a number or PRECISION=NUMBER", param_hint="--tolerance"
            ) from None
    return values
