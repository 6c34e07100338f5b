"""Renders a report: rich tables for a terminal, one self-contained page for a browser."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import missing_extra, printable
from .report import OutputComparison, Report, Side

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

WIDE = 120
"""Columns from which a terminal gets every figure."""

SIDES = {
    "base": "the model without the adapter",
    "plain": "the base with the adapter's heads and biases, without its weight changes",
    "torch": "the adapted model, rebuilt here from base and bundle by the formula, in float64",
    "peft": "the adapted model as PEFT itself computes it",
    "merged": "the merged checkpoint, loaded by transformers",
    "onnx": "the ONNX file, run by ONNX Runtime",
}
"""What each side is, by the part of its name before a colon."""

FIGURES = {
    "max_abs": "the largest difference between two values",
    "max_rel": "the largest difference relative to its value",
    "mean_abs": "the mean difference",
    "rms": "the root mean square of the differences",
    "allowed": "the bounds on them: by the output's size, by the adapter's effect and rounding",
    "cosine": "1 where both point in the same direction",
    "argmax": "the share of rows with the same largest entry, that is, the same prediction",
}
NARROW_FIGURES = ("max_abs", "mean_abs", "cosine", "argmax")


def describe_side(side: Side) -> str:
    """What a side is, in one sentence without a full stop."""
    if not side.source:
        return "a function that the caller gave"
    kind, _, rounded = side.name.partition(":")
    meaning = SIDES.get(kind, "")
    half = rounded in ("float16", "bfloat16")
    return f"{meaning}, its weights rounded to {rounded}" if meaning and half else meaning


def explain_figures(names: tuple[str, ...]) -> str:
    """What the columns of the comparisons mean, as one line."""
    signs = "=: must agree; ≠: must differ. "
    return signs + "; ".join(f"{name.replace('_', ' ')}: {FIGURES[name]}" for name in names) + "."


def render_text(report: Report) -> RenderableType:
    """Renders the sides, the comparisons and the verdict for a rich console.

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
        figures = tuple(FIGURES) if options.max_width >= WIDE else NARROW_FIGURES
        yield _sides_table(self.report)
        yield Text("")
        yield _pairs_table(self.report, figures)
        yield Text(explain_figures(figures), style="dim")
        yield Text("")
        yield from (Text(line) for line in _verdict(self.report))


def _sides_table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_title(report), title_justify="left", box=None)
    for name in ("side", "what it is", "weights", "outputs", "seconds", "from"):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for side in report.sides:
        cells = (side.name, describe_side(side), side.precision, _shapes(side.outputs))
        # Text objects, so that no name from a file is taken for markup.
        row = (*cells, f"{side.seconds:.1f}", side.source)
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _pairs_table(report: Report, figures: tuple[str, ...]) -> Table:
    """One line per output of a pair; the output is named where there are several."""
    from rich.table import Table
    from rich.text import Text

    rows = list(_rows(report))
    several = len({row["output"] for row in rows}) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("pair", overflow="fold")
    columns = ("output",) * several + figures
    for name in columns:
        left = name == "output"
        table.add_column(name.replace("_", " "), justify="left" if left else "right", no_wrap=True)
    table.add_column("")
    for row in rows:
        good = row["verdict"] == "ok"
        table.add_row(
            Text(f"{row['left']} {row['sign']} {row['right']}"),
            *(Text(row[name]) for name in columns),
            Text(row["verdict"], style="" if good else "bold red" if row["reason"] else "dim"),
        )
    return table


def render_html(report: Report) -> str:
    """Renders the report as one HTML page that needs nothing else: no scripts, no links.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "report", "a report as HTML") from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["printable"] = printable
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    page: str = environment.from_string(template).render(
        report=report,
        title=_title(report),
        verdict=_verdict(report),
        rows=list(_rows(report)),
        figures=list(FIGURES),
        legend=explain_figures(tuple(FIGURES)),
        describe=describe_side,
        shapes=_shapes,
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
    lines = [f"FAILED: {problem}" for problem in report.problems]
    if report.first_failure is not None:
        pair, output = report.first_failure
        place = f"{pair.left} against {pair.right}, output {output.output}"
        lines.append(f"FAILED: {place}: {output.reason}")
    if report.suspects:
        lines.append(f"Every failing pair contains {' and '.join(report.suspects)}.")
    return [printable(line) for line in lines]


def _rows(report: Report) -> Iterator[dict[str, str]]:
    """Each output of each comparison as text, by column."""
    for pair in report.comparisons:
        for output in pair.outputs:
            yield {
                "left": printable(pair.left),
                "right": printable(pair.right),
                "sign": "=" if pair.expect == "equal" else "≠",
                "output": printable(output.output),
                # An output that need not change in a pair where another one does is no failure.
                "verdict": "ok" if output.ok else "unchanged" if pair.ok else "FAILED",
                "reason": "" if pair.ok else printable(output.reason),
                **_figures(output),
                **_places(output),
            }


def _places(output: OutputComparison) -> dict[str, str]:
    """Where the page's scale shows the difference and its bound: 0 to 100 for 1e-12 to 1."""
    found = output.difference
    if found is None or found.scale <= 0:
        return {"dot": "", "bar": ""}
    values = {"dot": found.rms, "bar": output.allowed_rms}
    return {
        name: ""
        if value is None
        else f"{100 + log10(min(max(value / found.scale, 1e-12), 1)) / 0.12:.1f}"
        for name, value in values.items()
    }


def _figures(output: OutputComparison) -> dict[str, str]:
    found = output.difference
    if found is None:
        return dict.fromkeys(FIGURES, "-")
    allowed = f"rms > {output.allowed_rms:.1e}" if output.allowed_rms is not None else "-"
    if output.allowed_abs is not None:
        allowed = f"abs {output.allowed_abs:.1e}" + (
            f", rms {output.allowed_rms:.1e}" if output.allowed_rms is not None else ""
        )
    numbers = {name: f"{getattr(found, name):.2e}" for name in list(FIGURES)[:4]}
    argmax = "-" if found.argmax is None else f"{found.argmax:.1%}"
    return numbers | {"allowed": allowed, "cosine": f"{found.cosine:.6f}", "argmax": argmax}


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
