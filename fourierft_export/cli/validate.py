"""validate: checks that artifacts of one adapter agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..types import Progress
from . import options
from .console import Outcome, failure_of, verb


@verb(
    examples=(
        "validate --base base --bundle a.fourierft.safetensors --peft adapter --merged merged",
        "validate --base base --bundle a.fourierft.safetensors --onnx unmerged.onnx "
        "--report report.html",
    )
)
@options.base_option
@options.input_path("--bundle", metavar="BUNDLE", help="The adapter as a bundle.")
@options.input_path("--peft", metavar="DIR", help="The adapter as PEFT saved it.")
@options.input_path("--merged", metavar="DIR", help="A merged checkpoint.")
@options.input_path("--onnx", multiple=True, metavar="FILE", help="ONNX file; may be repeated.")
@options.input_path(
    "--inputs",
    metavar="PATH",
    help="What to run on: texts (.txt, .tsv, .jsonl), a folder of images, or arrays by input name "
    "(.npz).  [default: sentences]",
)
@options.task_option
@options.setting_option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="[PRECISION=]X",
    help="Allowed difference, as a fraction of the output's largest value, such as 1e-3 (for "
    "float32) or bfloat16=0.1; may be repeated.  [default: 1e-4 for float32]",
)
@options.setting_option(
    "--samples",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="Number of sentences, without --inputs.",
)
@options.setting_option(
    "--threads", type=click.IntRange(1), metavar="N", help="Threads of ONNX Runtime."
)
@options.output_section(
    "--report", type=options.PATH, metavar="FILE.html", help="Write the report as a web page."
)
@options.force_option
@options.allow_mismatch_option
def validate(
    progress: Progress,
    tolerances: tuple[str, ...],
    report: str | None,
    force: bool,
    **settings: Any,
) -> Outcome:
    """Check that artifacts of one adapter agree.

    Every artifact is run on the same inputs. All adapted ones must agree with each other and must
    differ from the base; if not, the exit code is 5.
    """
    from ..files.staging import check_output, staged_file
    from ..proof.render import render_html, render_text
    from ..proof.validate import validate as run

    if report:
        paths = [settings[name] for name in ("base", "bundle", "peft", "merged", "inputs")]
        inputs = tuple(path for path in (*paths, *settings["onnx"]) if path)
        check_output(report, force=force, inputs=inputs)
    found = run(tolerances=_tolerances(tolerances), progress=progress, **settings)
    if report:
        with staged_file(report, force=force) as partial:
            partial.write_text(render_html(found), encoding="utf-8")
    shown = [render_text(found), *([f"report: {Path(report)}"] if report else [])]
    return Outcome({"validate": found.to_dict()}, shown, found.notes, failure_of(found))


def _tolerances(words: tuple[str, ...]) -> dict[str, float]:
    """Reads `1e-3` (for float32) and `bfloat16=0.1` as precision -> number."""
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
