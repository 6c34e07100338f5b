"""demo: the whole job on real data, without a download."""

from __future__ import annotations

import click

from ..types import Progress
from .console import Outcome, verb
from .options import PATH, force_option


@verb
@click.option(
    "-o", "--output", type=PATH, default="fourierft-demo", show_default=True, metavar="DIR"
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N")
@force_option
def demo(progress: Progress, output: str, seed: int, force: bool) -> Outcome:
    """Train, pack, merge, export and validate two adapters of a small vision transformer.

    It is trained here on scikit-learn's handwritten digits; one adapter teaches it inverted
    images, the other rotated ones.
    """
    from ..files.staging import check_output

    check_output(output, force=force)
    from ..demo.render import render
    from ..demo.run import run_demo

    result = run_demo(output, seed=seed, force=force, progress=progress)
    return Outcome({"demo": result.to_dict()}, [render(result)])
