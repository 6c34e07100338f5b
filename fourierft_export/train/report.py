"""What a run reports: one object, as JSON while it runs and at its end."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from ..files.staging import staged_file
from ..files.strict_json import pretty
from .state import History

SCHEMA = 1
PACKAGES = ("fourierft-export", "torch", "numpy", "safetensors", "transformers")
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class TrainReport:
    """What was trained, how well, and what it took.

    Attributes:
        bundle: the adapter's file; None where no evaluation was reached.
        bundle_bytes: its size.
        folder: where the state, metrics and picture lie.
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
        history: losses, gradient norms, seconds by step; all evaluations.
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
    history: History
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps, without the first few; 0 where there were none."""
        seconds = self.history.seconds
        return median(seconds[WARM_UP_STEPS:] or seconds or [0.0])

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """The report as JSON values; numbers that are not finite become text.

        Args:
            curves: with every step's loss, gradient and time.
        """
        taken = {k: v for k, v in self.__dict__.items() if k != "history"}
        found = taken | {
            "schema": SCHEMA,
            "seconds_per_step": self.seconds_per_step,
            "evaluations": self.history.evaluations,
            "versions": versions(),
        }
        if curves:
            history = self.history
            found["curves"] = {
                "loss": history.losses,
                "gradient_norm": history.norms,
                "seconds": history.seconds,
            }
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
    """Write the whole report as JSON; the file is the old one or the new one.

    Raises:
        FileAccessError: it cannot be written.
    """
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
