"""A report for people: rich tables for a terminal, one self-contained page for a browser."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from ..errors import missing_extra, printable
from .report import Comparison, Difference, OutputComparison, Report

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

WIDE = 120
"""Columns from which a terminal gets every figure."""


class Row(NamedTuple):
    """One output of one comparison, as text."""

    left: str
    right: str
    expect: str
    output: str
    max_abs: str
    max_rel: str
    mean_abs: str
    rms: str
    allowed: str
    cosine: str
    argmax: str
    verdict: str
    reason: str


def render_text(report: Report) -> RenderableType:
    """The sides, the comparisons and the verdict, for `rich.print` or a rich console.

    Narrow terminals get fewer columns, so that a pair stays on one line; the page and `to_dict`
    have all figures.
    """
    return _Text(report)


class _Text:
    """A report that knows the console's width when it is drawn."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        del console
        yield _sides_table(self.report)
        yield Text("")
        yield _pairs_table(self.report, wide=options.max_width >= WIDE)
        yield Text("")
        yield from (Text(line) for line in _verdict(self.report))


def _sides_table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_title(report), title_justify="left", box=None)
    for name in ("side", "weights", "outputs", "seconds", "from"):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for side in report.sides:
        cells = (side.name, side.precision, _shapes(side.outputs), f"{side.seconds:.1f}")
        # Text objects, so that no name from a file is taken for markup.
        table.add_row(*(Text(printable(cell)) for cell in (*cells, side.source)))
    return table


def _pairs_table(report: Report, *, wide: bool) -> Table:
    """One line per output of a pair; the output is named where there are several."""
    from rich.table import Table
    from rich.text import Text

    rows = list(_rows(report))
    several = len({row.output for row in rows}) > 1
    figures = (
        ("max_abs", "max_rel", "mean_abs", "rms", "allowed") if wide else ("max_abs", "mean_abs")
    )
    columns = ("output",) * several + figures + ("cosine", "argmax")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("pair", overflow="fold")
    for name in columns:
        left = name == "output"
        table.add_column(name.replace("_", " "), justify="left" if left else "right", no_wrap=True)
    table.add_column("")
    for row in rows:
        sign = "=" if row.expect == "equal" else "≠"
        good = row.verdict == "ok"
        table.add_row(
            Text(f"{row.left} {sign} {row.right}"),
            *(Text(getattr(row, name)) for name in columns),
            Text(row.verdict, style="" if good else "bold red" if row.reason else "dim"),
        )
    return table


def render_html(report: Report) -> str:
    """The report as one HTML page that needs nothing else: no scripts, no links to elsewhere.

    With matplotlib installed it holds a picture of the differences.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "report", "a report as HTML") from error
    from .html_template import TEMPLATE

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["printable"] = printable
    page: str = environment.from_string(TEMPLATE).render(
        report=report,
        title=_title(report),
        verdict=_verdict(report),
        rows=list(_rows(report)),
        shapes=_shapes,
        picture=_picture(report),
        versions=_versions(),
    )
    return page


def _title(report: Report) -> str:
    return printable(f"{report.task}, {report.inputs}" if report.task else report.inputs)


def _verdict(report: Report) -> list[str]:
    """One line if all is well, else what is wrong, the first difference first."""
    if report.ok:
        equal = sum(pair.expect == "equal" for pair in report.comparisons)
        return [f"OK: {equal} pairs agree, {len(report.comparisons) - equal} differ as they must."]
    lines = [f"FAILED: {printable(problem)}" for problem in report.problems]
    first = report.first_failure
    if first is not None:
        pair, output = first
        lines.append(
            printable(
                f"FAILED: {pair.left} against {pair.right}, output {output.output}: {output.reason}"
            )
        )
    if report.suspects:
        suspects = printable(" and ".join(report.suspects))
        lines.append(f"Every failing pair contains {suspects}.")
    return lines


def _rows(report: Report) -> Iterator[Row]:
    for pair in report.comparisons:
        for output in pair.outputs:
            yield _row(pair, output)


def _row(pair: Comparison, output: OutputComparison) -> Row:
    names = (printable(pair.left), printable(pair.right), pair.expect, printable(output.output))
    # An output that need not change in a pair where another one does is no failure.
    verdict = "ok" if output.ok else "unchanged" if pair.ok else "FAILED"
    reason = "" if pair.ok else printable(output.reason)
    numbers = ("-",) * 7 if output.difference is None else _numbers(output, output.difference)
    return Row(*names, *numbers, verdict, reason)


def _numbers(
    output: OutputComparison, found: Difference
) -> tuple[str, str, str, str, str, str, str]:
    if output.allowed_abs is not None:
        allowed = f"abs {output.allowed_abs:.1e}"
        if output.allowed_rms is not None:
            allowed += f", rms {output.allowed_rms:.1e}"
    else:
        allowed = f"rms > {output.allowed_rms:.1e}"
    return (
        f"{found.max_abs:.2e}",
        f"{found.max_rel:.2e}",
        f"{found.mean_abs:.2e}",
        f"{found.rms:.2e}",
        allowed,
        f"{found.cosine:.6f}",
        "-" if found.argmax is None else f"{found.argmax:.1%}",
    )


def _shapes(outputs: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in outputs)


def _versions() -> str:
    found = []
    for package in ("fourierft-export", "torch", "transformers", "onnxruntime", "peft"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _picture(report: Report) -> str | None:
    """Differences on a logarithmic axis as a PNG in base64; None without matplotlib or data."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    points = [
        (f"{pair.left} / {pair.right} · {output.output}", pair, output, output.difference)
        for pair in report.comparisons
        for output in pair.outputs
        if output.difference is not None and output.difference.scale > 0
    ]
    if not points:
        return None
    figure = Figure(figsize=(8.5, 1.2 + 0.26 * len(points)), layout="constrained")
    axes = figure.add_subplot()
    labels = []
    for y, (label, pair, output, found) in enumerate(points):
        color = "#c0392b" if not pair.ok else "#2c7a4b" if pair.expect == "equal" else "#2f6db3"
        # Exact agreement has no place on a logarithmic axis: it sits at the left edge.
        axes.plot(max(found.rms / found.scale, 1e-12), y, "o", color=color)
        if output.allowed_rms is not None:
            axes.plot(output.allowed_rms / found.scale, y, "|", color="#555555", markersize=12)
        labels.append(printable(label).replace("$", r"\$"))
    axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "root mean square difference / scale   (green: must agree, blue: must differ, bar: bound)",
        fontsize=8,
    )
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return b64encode(buffer.getvalue()).decode("ascii")
