"""verify: checks a merged directory against its manifest."""

from __future__ import annotations

import click

from ..errors import ValidationError
from ..types import Progress
from . import options
from .console import Outcome, size_text, verb


@verb(examples=("verify merged",))
@click.argument("directory", type=options.PATH)
def verify(progress: Progress, directory: str) -> Outcome:
    """Check the files of a merged directory against its manifest."""
    from ..merge.manifest import verify_merged

    report = verify_merged(directory, progress=progress)
    failure = None
    try:
        report.raise_for_failure()
    except ValidationError as error:
        failure = error
    state = "as they were written" if report.ok else "NOT as they were written"
    line = f"{directory}: {report.files} files, {size_text(report.nbytes)}, {state}"
    notes = [f"{name} is not in the manifest" for name in report.unlisted if report.ok]
    return Outcome({"verify": report.to_dict()}, [line], notes, failure)
