"""push: uploads a bundle to the Hugging Face Hub."""

from __future__ import annotations

import click

from . import options
from .console import Outcome, verb


@verb(examples=("push a.fourierft.safetensors user/sst2", "push adapter user/sst2 --private"))
@click.argument("bundle", type=options.PATH)
@click.argument("repo", metavar="USER/REPO")
@options.input_path(
    "--metrics",
    metavar="FILE",
    help="The metrics.json of the training, for the card.  [default: BUNDLE.train/metrics.json]",
)
@options.output_section("--private", is_flag=True, help="Make a private repository.")
@options.output_section("--revision", metavar="BRANCH", help="Branch to commit to.")
def push(
    bundle: str, repo: str, metrics: str | None, private: bool, revision: str | None
) -> Outcome:
    """Upload a bundle to the Hugging Face Hub, with a model card.

    BUNDLE is a bundle or a PEFT adapter directory. The repository is made if it is not there.
    """
    import os

    from ..bundle.push import push as upload
    from ..errors import BadInputError
    from ..files import strict_json
    from ..files.safetensors_reader import read_file

    beside = f"{bundle}.train/metrics.json"
    path = metrics or (beside if os.path.isfile(beside) else None)
    best = None
    if path is not None:
        report = strict_json.loads(read_file(path), path)
        best = report.get("best") if isinstance(report, dict) else None
        numbers = isinstance(best, dict) and all(isinstance(v, int | float) for v in best.values())
        if not numbers:
            expected = "a training's metrics.json, whose `best` holds numbers"
            raise BadInputError(path, expected=expected, found="another file")
    address = upload(bundle, repo, private=private, revision=revision, metrics=best)
    return Outcome({"repo": repo, "url": address, "metrics": best or {}}, [address])
