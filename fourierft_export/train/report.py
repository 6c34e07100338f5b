"""What a run reports, as one object, as JSON and as a picture of the learning curve."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

from ..files.staging import staged_file
from ..files.strict_json import pretty

SCHEMA = 1
PACKAGES = ("fourierft-export", "torch", "numpy", "safetensors", "transformers", "accelerate")
WARM_UP_STEPS = 3
BLUE, ORANGE, QUIET = "#0969da", "#d4570a", "#8c959f"


@dataclass(frozen=True)
class TrainReport:
    """What was trained, how well, and what it took.

    Attributes:
        bundle, bundle_bytes: the adapter's file and its size; None where no evaluation was reached.
        folder, metrics_file: where the checkpoint lies, and the same report as JSON.
        picture: the learning curve; None without matplotlib.
        metric, higher_is_better: which metric says what is best, and whether more of it is better.
        before, best: metrics of the adapter as it started and of the one in the bundle; empty
            without rows to score.
        best_step: after which step the bundle's adapter was taken.
        steps, planned_steps, steps_per_epoch: done, of the whole run, and batches in an epoch.
        stopped: "finished", "patience" or "interrupted".
        rows, eval_rows: how many rows were learnt from and scored.
        labels: names of the classes, by id; empty where there are none.
        parameters: numbers that learn: `spectra` and `heads`.
        adapter, rates: the layers, n_frequency and scaling, and the peak learning rates in use.
        settings: as given, with every default worked out.
        processes, device: how many trained together, and where.
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
    notes: tuple[str, ...]

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps, without the first few; 0 where there were none."""
        seconds = self.curves["seconds"]
        return median(seconds[WARM_UP_STEPS:] or seconds or [0.0])

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """The report as JSON values; numbers that are not finite become text."""
        # Where several folders hold a package, the first is the one that is imported.
        versions = {name: next(iter(distributions(name=name)), None) for name in PACKAGES}
        found = {
            **vars(self),
            "schema": SCHEMA,
            "seconds_per_step": self.seconds_per_step,
            "versions": {
                "python": platform.python_version(),
                **{name: one.version for name, one in versions.items() if one is not None},
            },
        }
        return {key: _plain(value) for key, value in found.items() if curves or key != "curves"}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the whole report as JSON; the file is the old one or the new one."""
        with staged_file(path, force=True) as partial:
            partial.write_text(pretty(self.to_dict()), "utf-8")

    def draw(self, path: Path) -> None:
        """Write a PNG: the loss by step, and the metric by evaluation with the best marked."""
        # The figure is used without pyplot, which would choose a window system.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        scored = [one for one in self.evaluations if self.metric in one["metrics"]]
        steps = [one["step"] for one in scored]
        figure = Figure(figsize=(10 if scored else 5.5, 3.8), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
        panels[0].plot(self.curves["step"], self.curves["loss"], color=QUIET, label="each step")
        panels[0].set_title("loss", loc="left")
        if scored:
            losses, values = (
                [one["metrics"][name] for one in scored] for name in ("loss", self.metric)
            )
            panels[0].plot(steps, losses, color=ORANGE, marker="o", label="scored")
            panels[1].plot(steps, values, color=BLUE, marker="o")
            best = self.best.get(self.metric, math.nan)
            panels[1].plot(self.best_step, best, color=ORANGE, marker="o", markersize=9)
            title = f"{self.metric}: {best:.4g} at its best, after step {self.best_step}"
            panels[1].set_title(title, loc="left")
        panels[0].legend(frameon=False)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xlabel("step")
        with staged_file(path, force=True) as partial:
            figure.savefig(partial, format="png")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
