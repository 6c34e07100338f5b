"""What a run reports, as one object, as JSON and as a picture of the learning curve."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..files.staging import staged_file
from ..files.strict_json import pretty

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = 1
PACKAGES = ("fourierft-export", "torch", "numpy", "safetensors", "transformers", "accelerate")
WARM_UP_STEPS = 3
BLUE, ORANGE, QUIET = "#0969da", "#d4570a", "#8c959f"


@dataclass(frozen=True)
class TrainReport:
    """What was trained, how well, and what it took.

    Attributes:
        bundle: the adapter's file; None where no evaluation was reached.
        bundle_bytes: its size.
        folder: where the checkpoint, metrics and picture lie.
        metrics_file: the same report as JSON.
        picture: the learning curve; None without matplotlib.
        metric: which metric says what is best.
        higher_is_better: whether more of it is better.
        before: metrics with the adapter as it started; empty without rows to score.
        best: metrics of the adapter in the bundle; empty likewise.
        best_step: after which it was taken.
        steps: done.
        planned_steps: of the whole run.
        steps_per_epoch: batches in an epoch.
        stopped: "finished", "patience" or "interrupted".
        rows: training rows; `eval_rows`: rows scored.
        labels: names of the classes, by id; empty where there are none.
        parameters: numbers that learn: `spectra` and `heads`.
        adapter: the layers, n_frequency and scaling in use.
        rates: peak learning rates in use.
        settings: as given, with every default worked out.
        processes: how many trained together.
        device: where.
        evaluations: by time: `step`, `epoch`, `metrics`, and `is_best`.
        curves: `step`, `loss`, `gradient_norm` and `seconds` of the steps that were logged: all
            of them, or of a long run means over as many as make 2,000 points.
        notes: what a person should know.
    """

    bundle: str | None
    bundle_bytes: int
    folder: str
    metrics_file: str
    picture: str | None
    metric: str
    higher_is_better: bool
    before: Mapping[str, float]
    best: Mapping[str, float]
    best_step: int
    steps: int
    planned_steps: int
    steps_per_epoch: int
    stopped: str
    rows: int
    eval_rows: int
    labels: tuple[str, ...]
    parameters: Mapping[str, int]
    adapter: Mapping[str, Any]
    rates: Mapping[str, float]
    settings: Mapping[str, Any]
    processes: int
    device: str
    evaluations: Sequence[Mapping[str, Any]]
    curves: Mapping[str, Sequence[float]]
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps, without the first few; 0 where there were none."""
        seconds = self.curves["seconds"]
        return median(seconds[WARM_UP_STEPS:] or seconds or [0.0])

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """The report as JSON values; numbers that are not finite become text."""
        found = self.__dict__ | {
            "schema": SCHEMA,
            "seconds_per_step": self.seconds_per_step,
            "versions": versions(),
        }
        if not curves:
            del found["curves"]
        return _plain(found)  # type: ignore[no-any-return]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_metrics(report: TrainReport, path: str | os.PathLike[str]) -> None:
    """Write the whole report as JSON; the file is the old one or the new one."""
    with staged_file(path, force=True) as partial:
        partial.write_text(pretty(report.to_dict()), "utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return os.fspath(value) if isinstance(value, Path) else value


def draw_curve(report: TrainReport, path: Path) -> None:
    """Write a PNG: training loss by step, and the metric by evaluation with the best marked."""
    # The figure is used without pyplot, which would choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = report.eval_rows > 0 and bool(report.evaluations)
    figure = Figure(figsize=(10 if scored else 5.5, 3.8), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    figure.subplots_adjust(left=0.07 if scored else 0.12, right=0.98, bottom=0.15, top=0.9)
    _draw_losses(panels[0], report)
    if scored:
        _draw_scores(panels[1], report)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
    with staged_file(path, force=True) as partial:
        figure.savefig(partial, format="png")


def _draw_losses(axes: Axes, report: TrainReport) -> None:
    steps, losses = report.curves["step"], report.curves["loss"]
    smooth = smoothed(losses, max(1, len(losses) // 40))
    axes.plot(steps, losses, color=QUIET, linewidth=0.8, alpha=0.6, label="each step")
    axes.plot(steps, smooth, color=BLUE, linewidth=1.8, label="smoothed")
    held = [(e["step"], e["metrics"]["loss"]) for e in report.evaluations if e["metrics"]]
    if held:
        axes.plot(*zip(*held, strict=True), color=ORANGE, marker="o", markersize=4, label="scored")
    axes.set_title("loss", loc="left")
    axes.legend(frameon=False)


def _draw_scores(axes: Axes, report: TrainReport) -> None:
    points = [(e["step"], e["metrics"][report.metric]) for e in report.evaluations]
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4)
    title = report.metric
    if report.best:
        value = report.best[report.metric]
        axes.plot(report.best_step, value, color=ORANGE, marker="o", markersize=9, fillstyle="none")
        title += f": {value:.4g} at its best, after step {report.best_step}"
    axes.set_title(title, loc="left")


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Means over the neighbours up to `reach` on either side, as far as there are any."""
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[first]) / (end - first) for first, end in ends]
