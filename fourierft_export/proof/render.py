"""Renders a report: rich tables for a terminal, one self-contained page for a browser."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.bundle import Bundle
from ..errors import missing_extra, printable
from .diff import delta_norm
from .plot_adapter import draw_bundle
from .report import SIGNS, OutputComparison, Report, Side

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

WIDE = 120
"""Columns from which a terminal gets every figure."""

SIDES = {
    "base": "the model without the adapter",
    "plain": "the base with the adapter's heads and biases only",
    "torch": "the base with the bundle added by the paper's formula",
    "peft": "the base with the adapter in PEFT",
    "merged": "the merged checkpoint in transformers",
    "onnx": "the ONNX file in ONNX Runtime",
}
"""What each side is, by the part of its name before a colon."""

FIGURES = {
    "max_abs": "the largest difference between two values",
    "max_rel": "the largest difference, as a fraction of the value",
    "mean_abs": "the mean difference",
    "rms": "the root mean square of the differences",
    "allowed": "the largest differences that pass",
    "cosine": "cosine of the angle between the outputs",
    "argmax": "the share of rows with the same largest entry, that is, the same prediction",
    "agreement": "where that share lies with 95 % confidence",
    "row_cosine": "the mean cosine of the angle between rows, such as embeddings",
    "KL": "divergence of the right softmax from the left one, in nats",
    "perplexity": "of the left side and the right one",
}
WIDE_FIGURES = tuple(FIGURES)[:7]
NARROW_FIGURES = ("max_abs", "mean_abs", "cosine", "argmax")


def describe_side(side: Side) -> str:
    """Describes a side in one phrase."""
    if not side.source:
        return "a function that the caller gave"
    kind, _, rounded = side.name.partition(":")
    half = f", rounded to {rounded}" if rounded in ("float16", "bfloat16") else ""
    return SIDES[kind] + half if kind in SIDES else ""


def explain_figures(names: tuple[str, ...]) -> str:
    """Explains the columns of the table of pairs in one line."""
    signs = "=: must agree; ≠: must differ. "
    return signs + "; ".join(f"{name.replace('_', ' ')}: {FIGURES[name]}" for name in names) + "."


def render_text(report: Report) -> RenderableType:
    """Renders the sides, the comparisons and the verdict for a rich console.

    Narrow terminals get fewer columns, so that a pair stays on one line; the page and `to_dict`
    have all figures. The first difference is left to the error that follows.
    """
    return _Text(report)


@dataclass(frozen=True)
class _Text:
    """A report that is drawn as wide as the console."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        del console
        wide, report = options.max_width >= WIDE, self.report
        figures = WIDE_FIGURES if wide else NARROW_FIGURES
        lines = _verdict(report)
        if not report.ok:
            failed = f"FAILED: {len(report.failing)} of {len(report.comparisons)} pairs."
            lines = [failed, *_suspects(report), *(f"{problem}." for problem in report.problems)]
            lines += [f"{cause}." for cause in report.causes]
        yield Text(f"{_title(report)}\n")
        yield _sides_table(report, wide)
        yield Text("")
        yield _pairs_table(report, figures)
        yield Text(explain_figures(figures), style="dim")
        yield Text(f"\n{printable(' '.join(lines))}")


def _table() -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _sides_table(report: Report, wide: bool) -> Table:
    """Makes the table of sides; only a wide one says which files they came from."""
    from rich.text import Text

    table = _table()
    for name in ("side", "weights", "seconds", "what it is", *["outputs", "from"] * wide):
        right = name == "seconds"
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "what it is")
    for side in report.sides:
        cells = [side.name, side.precision, f"{side.seconds:.1f}", describe_side(side)]
        cells += [_shapes(side.outputs), side.source] if wide else []
        # Text objects, so that no name from a file is taken for markup.
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _pairs_table(report: Report, figures: tuple[str, ...]) -> Table:
    """Makes the table of pairs, a line per output; outputs are named where there are several."""
    from rich.text import Text

    rows = list(_rows(report))
    several = len({row["output"] for row in rows}) > 1
    table = _table()
    table.add_column("pair", overflow="fold")
    columns = ("output",) * several + figures
    for name in columns:
        left = name == "output"
        table.add_column(name.replace("_", " "), justify="left" if left else "right", no_wrap=True)
    table.add_column("")
    for row in rows:
        style = "" if row["verdict"] == "ok" else "bold red" if row["reason"] else "dim"
        cells = [f"{row['left']} {row['sign']} {row['right']}", *(row[name] for name in columns)]
        table.add_row(*map(Text, cells), Text(row["verdict"], style=style))
    return table


def render_html(
    report: Report, bundle: Bundle | None = None, survival: Mapping[str, float] | None = None
) -> str:
    """Renders the report as one HTML page that needs nothing else: no scripts, no links.

    Args:
        report: of a validation.
        bundle: shown with a table of its layers and pictures of spectrum, entries and delta_W.
        survival: layer -> share of its weights that the merge changed, after rounding.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "report", "a report as HTML") from error
    drawn = find_spec("matplotlib") is not None
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
        picture=b64encode(draw_bundle(bundle)).decode() if bundle and drawn else None,
        bundle=bundle,
        layers=list(_layers(bundle, survival or {})) if bundle else [],
        size=_size,
    )
    return page


def _layers(bundle: Bundle, survival: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """Yields the cells of each layer: name, shape, coefficients, norm of delta_W, survival."""
    for layer in bundle.layers:
        shape = "-" if layer.shape is None else " x ".join(map(str, layer.shape))
        norm = "-" if layer.shape is None else f"{delta_norm(bundle, layer):.4g}"
        share = survival.get(layer.name)
        changed = "-" if share is None else f"{share:.1%}"
        yield printable(layer.name), shape, str(layer.n_frequency), norm, changed


def _size(side: Side) -> str:
    """The size in bytes of a side's file or folder; empty where it has none."""
    path = Path(side.source)
    files = [path] if path.is_file() else path.glob("*") if side.source and path.is_dir() else ()
    total = sum(file.stat().st_size for file in files if file.is_file())
    return f"{total:,}" if total else ""


def _title(report: Report) -> str:
    return printable(f"{report.task}, {report.inputs}" if report.task else report.inputs)


def _verdict(report: Report) -> list[str]:
    """Says in one line that all is well, or what is wrong, the first difference first."""
    if report.ok:
        equal = sum(pair.expect == "equal" for pair in report.comparisons)
        different = len(report.comparisons) - equal
        if not equal:
            pairs = "pair differs as it must" if different == 1 else "pairs differ as they must"
            what = "no two sides were given that must agree, so no agreement was checked"
            return [f"OK, but only partly checked: {different} {pairs}; {what}."]
        pairs = "pair agrees" if equal == 1 else "pairs agree"
        return [f"OK: {equal} {pairs}, {different} differ as they must."]
    first = [f"{place}: {reason}" for place, reason in report.findings[:1]]
    lines = [f"FAILED: {line}" for line in (*report.problems, *first)]
    lines += [f"Likely cause: {cause}" for cause in report.causes]
    return [printable(line) for line in (*lines, *_suspects(report))]


def _suspects(report: Report) -> list[str]:
    """Names the sides that every failing pair contains, if there are any."""
    names = printable(" and ".join(report.suspects))
    return [f"Every failing pair contains {names}."] if names else []


def _rows(report: Report) -> Iterator[dict[str, str]]:
    """Yields the cells of each output of each pair, by column."""
    for pair in report.comparisons:
        for output in pair.outputs:
            yield {
                "left": printable(pair.left),
                "right": printable(pair.right),
                "sign": SIGNS[pair.expect],
                "output": printable(output.output),
                # An output that need not change in a pair where another one does is no failure.
                "verdict": "ok" if output.ok else "unchanged" if pair.ok else "FAILED",
                "reason": "" if pair.ok else printable(output.reason),
                "budget": output.budget,
                **_figures(output),
                "dot": _place(output, output.difference.rms if output.difference else None),
                "bar": _place(output, output.allowed_rms),
            }


def _place(output: OutputComparison, value: float | None) -> str:
    """Places a value of the output on the page's scale, where 1e-12 is 0 and 1 is 100."""
    scale = output.difference.scale if output.difference else 0
    if value is None or scale <= 0:
        return ""
    return f"{100 + log10(min(max(value / scale, 1e-12), 1)) / 0.12:.1f}"


def _figures(output: OutputComparison) -> dict[str, str]:
    """Writes the figures of one output, by column."""
    found, bounds = output.difference, (output.allowed_abs, output.allowed_rms)
    if found is None:
        return dict.fromkeys(FIGURES, "-")
    both = [f"{name} {n:.1e}" for name, n in zip(("abs", "rms"), bounds, strict=True) if n]
    numbers = {name: f"{getattr(found, name):.2e}" for name in list(FIGURES)[:4]}
    low, high = found.agreement or (0, 0)
    left, right = found.perplexity or (0, 0)
    return numbers | {
        "agreement": f"{low:.1%} to {high:.1%}" if found.agreement else "-",
        "row_cosine": f"{found.row_cosine:.6f}",
        "KL": "-" if found.kl is None else f"{found.kl:.1e}",
        "perplexity": f"{left:.5g}, {right:.5g}" if found.perplexity else "-",
        "allowed": f"rms > {bounds[1]:.1e}" if bounds[0] is None else ", ".join(both),
        "cosine": f"{found.cosine:.6f}",
        "argmax": "-" if found.argmax is None else f"{found.argmax:.1%}",
    }


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
