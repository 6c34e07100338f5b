"""The learning curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.staging import staged_file
from .report import TrainReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, QUIET = "#0969da", "#d4570a", "#8c959f"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_curve(report: TrainReport, path: Path) -> None:
    """Write a PNG: training loss by step, and the metric by evaluation with the best marked.

    Raises:
        FileAccessError: it cannot be written.
    """
    # The figure is used without pyplot, which would choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = report.eval_rows > 0 and bool(report.history.evaluations)
    figure = Figure(figsize=(10 if scored else 5.5, 3.8), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    figure.subplots_adjust(left=0.07 if scored else 0.12, right=0.98, bottom=0.15, top=0.9)
    _losses(panels[0], report)
    if scored:
        _scores(panels[1], report)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
    with staged_file(path, force=True) as partial:
        figure.savefig(partial, format="png")


def _losses(axes: Axes, report: TrainReport) -> None:
    losses = report.history.losses
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=QUIET, linewidth=0.8, alpha=0.6, label="each step")
    axes.plot(
        steps,
        smoothed(losses, max(1, len(losses) // 40)),
        color=BLUE,
        linewidth=1.8,
        label="smoothed",
    )
    held = [(e["step"], e["metrics"]["loss"]) for e in report.history.evaluations if e["metrics"]]
    if held:
        axes.plot(*zip(*held, strict=True), color=ORANGE, marker="o", markersize=4, label="scored")
    axes.set_title("loss", loc="left")
    axes.legend(frameon=False)


def _scores(axes: Axes, report: TrainReport) -> None:
    points = [(e["step"], e["metrics"][report.metric]) for e in report.history.evaluations]
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4)
    title = report.metric
    if report.best:
        value = report.best[report.metric]
        axes.plot(report.best_step, value, color=ORANGE, marker="o", markersize=9, fillstyle="none")
        title += f": {value:.4g} at its best, after step {report.best_step}"
    axes.set_title(title, loc="left")


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Means over the neighbours up to `reach` on either side, as far as there are any.

    A mean that only looks back would lag behind a loss that falls fast.
    """
    sums = [0.0, *accumulate(values)]
    count = len(values)
    found = []
    for i in range(count):
        first, end = max(0, i - reach), min(count, i + reach + 1)
        found.append((sums[end] - sums[first]) / (end - first))
    return found
