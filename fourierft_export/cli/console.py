"""Makes verbs of functions: results as text or JSON, errors, progress on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from ..errors import MAX_OFFENDERS_SHOWN, FourierFTError, ValidationError, printable, shortened
from ..types import Progress
from .option_sections import Sectioned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, RenderableType
    from rich.progress import Task

    from ..onnx_graph.report import ExportReport

SCHEMA = 1
SHOW_PROGRESS_AFTER = 1.0
COUNTED_IN_BYTES = frozenset({"merging", "verifying", "recovering"})


@dataclass(frozen=True)
class Outcome:
    """The result of a verb, for people and for programs.

    Attributes:
        data: the object of `--json`, without schema and ok.
        shown: lines and tables for people, printed in this order on stdout.
        notes: warnings for people, printed on stderr.
        failure: an error to print after the result (a failed validation).
        silent: print nothing, since another process prints the result.
    """

    data: Mapping[str, Any]
    shown: Iterable[RenderableType] = ()
    notes: Iterable[str] = field(default_factory=tuple)
    failure: FourierFTError | None = None
    silent: bool = False


def verb(*, examples: tuple[str, ...] = ()) -> Callable[[Callable[..., Outcome]], Sectioned]:
    """Makes a click command of a function that returns an `Outcome`; adds --json and --debug.

    The function gets its options, and `progress` when it has a parameter of that name.

    Args:
        examples: for the help, without "fourierft-export".
    """

    def make_command(function: Callable[..., Outcome]) -> Sectioned:
        bar = progress_bar if "progress" in function.__annotations__ else nullcontext

        @wraps(function)
        def command(*, as_json: bool, debug: bool, **options: Any) -> int:
            del debug  # read by main(), because errors may come before this point
            with bar() as progress:
                outcome = function(**options, **({"progress": progress} if progress else {}))
            if not outcome.silent:
                _print_outcome(outcome, as_json=as_json)
            if outcome.failure is None:
                return 0
            error = outcome.failure
            emit_error(error.to_dict(), error.summary, as_json=as_json, data=outcome.data)
            return error.exit_code

        made = click.command(function.__name__, cls=Sectioned)(command)
        made.examples = examples
        made.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
            click.Option(
                ["--debug"], is_flag=True, help="Show tracebacks and libraries' messages."
            ),
        ]
        return made

    return make_command


def _print_outcome(outcome: Outcome, *, as_json: bool) -> None:
    """Prints the result on stdout and the notes on stderr."""
    errors = _console(stderr=True)
    if as_json:
        # A failed verb prints one object too, with the error in it (`emit_error`).
        if outcome.failure is None:
            found = {"schema": SCHEMA, "ok": True, **outcome.data, "notes": list(outcome.notes)}
            print(json.dumps(found))
    else:
        console = _console(stderr=False)
        for item in outcome.shown:
            if isinstance(item, str):
                console.print(printable(item), markup=False, highlight=False, soft_wrap=True)
            else:
                console.print(item)
    for note in outcome.notes:
        errors.print(f"note: {printable(note)}", markup=False, highlight=False, soft_wrap=True)


def emit_error(
    fields: Mapping[str, Any],
    summary: str,
    *,
    as_json: bool,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Prints an error: a line and at most 20 offenders on stderr, with --json an object on stdout.

    Args:
        fields: the error's fields, as `FourierFTError.to_dict` gives them.
        summary: the line.
        as_json: whether --json was given.
        data: what the verb found before it failed; it goes into the object.
    """
    if as_json:
        found = {"schema": SCHEMA, "ok": False, "error": dict(fields), **(data or {})}
        print(json.dumps(found))
    offenders = list(fields["offenders"])
    lines = [shortened(f"error: {printable(summary)}")]
    lines += [f"  {line}" for line in offenders[:MAX_OFFENDERS_SHOWN]]
    if len(offenders) > MAX_OFFENDERS_SHOWN:
        lines[-1] = f"  ... and {len(offenders) - MAX_OFFENDERS_SHOWN + 1} more"
    sys.stderr.write("\n".join(lines) + "\n")


def failure_of(report: Any) -> ValidationError | None:
    """Returns the error that `report.raise_for_failure()` raises, if it raises one."""
    try:
        report.raise_for_failure()
    except ValidationError as error:
        return error
    return None


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    # Into a pipe or a file, tables keep their natural width instead of 80 columns.
    return console if console.is_terminal else Console(stderr=stderr, width=160)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callback (what, done, total) that draws a bar on stderr, on terminals, after a second."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    from rich import progress as rich
    from rich.text import Text

    class Rate(rich.ProgressColumn):
        """Bytes done, in all, and per second, of work that is counted in bytes."""

        def render(self, task: Task) -> Text:
            if task.description not in COUNTED_IN_BYTES or not task.total or not task.speed:
                return Text()
            sizes = [size_text(int(n)) for n in (task.completed, task.total, task.speed)]
            return Text("{} of {}, {}/s".format(*sizes))

    bar = rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=16),
        rich.TextColumn("{task.percentage:>3.0f}%"),
        Rate(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        console=_console(stderr=True),
        transient=True,
    )
    began = time.monotonic()
    task = bar.add_task("")

    def progress(what: str, done: int, total: int) -> None:
        if time.monotonic() - began < SHOW_PROGRESS_AFTER:
            return
        bar.update(task, description=printable(what), completed=done, total=total)
        bar.start()

    try:
        yield progress
    finally:
        bar.stop()


def size_text(count: int) -> str:
    """Writes a number of bytes for people: 96,388 bytes; 2.1 MB; 13.5 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,} bytes"


def graph_lines(report: ExportReport) -> list[str]:
    """Describes a written ONNX file in two lines."""
    return [
        f"{report.path}: {report.mode}, opset {report.opset}, {len(report.layers)} layers adapted, "
        f"{report.nodes} nodes, {size_text(report.bytes)}",
        f"  inputs: {', '.join(report.inputs)}; outputs: {', '.join(report.outputs)}",
    ]
