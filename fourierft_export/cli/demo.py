"""demo: runs the whole job on real images, without a download."""

from __future__ import annotations

from ..types import Progress
from . import options
from .console import Outcome, verb


@verb(examples=("demo", "demo -o elsewhere --seed 1"))
@options.setting_option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the training."
)
@options.output_section(
    "-o",
    "--output",
    type=options.PATH,
    default="fourierft-demo",
    show_default=True,
    metavar="DIR",
    help="The folder to write.",
)
@options.force_option
def demo(progress: Progress, output: str, seed: int, force: bool) -> Outcome:
    """Run the whole job on real images, without a download.

    A small vision transformer is trained on scikit-learn's handwritten digits. Two adapters, one
    for inverted images and one for rotated ones, are trained, packed, merged, exported and
    validated.
    """
    from ..files.staging import check_output

    check_output(output, force=force)
    from ..demo.run import run_demo
    from ..demo.show import render

    result = run_demo(output, seed=seed, force=force, progress=progress)
    return Outcome({"demo": result.to_dict()}, [render(result)])
