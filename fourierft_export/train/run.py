"""A run in progress: from step to step, keeping the best, leaving a state to resume from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..bundle.file import Bundle
from ..errors import FileAccessError
from ..types import Progress
from . import defaults
from .adapter import LiveAdapter
from .curve import can_draw, draw_curve
from .evaluate import LOWER_IS_BETTER, check_metric, evaluate, is_better
from .interrupt import TrainingInterrupted
from .live import identity
from .order import mixed_seed
from .plan import Plan
from .report import TrainReport, write_metrics
from .schedule import rate_factor
from .settings import TrainSettings
from .state import (
    FILE,
    History,
    State,
    check_same,
    folder_of,
    load_state,
    moments_of,
    save_state,
    set_moments,
)
from .step import PEAK, Learner
from .task import TrainingTask

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # between two states, if no evaluation comes first
PICTURE = "curve.png"


class Run:
    """A run in progress."""

    def __init__(
        self,
        task: TrainingTask,
        settings: TrainSettings,
        adapter: LiveAdapter,
        learner: Learner,
        plan: Plan,
        out: Path,
        metrics_file: Path,
        picture: bool,
        notes: tuple[str, ...],
    ) -> None:
        self.task, self.settings, self.adapter, self.learner = task, settings, adapter, learner
        self.plan, self.out, self.metrics_file, self.notes = plan, out, metrics_file, notes
        self.picture = picture
        self.processes = learner.processes
        self.folder = folder_of(out)
        self.history = History()
        self.metric = settings.metric or task.metric
        own = self.metric == task.metric
        self.higher = task.higher_is_better if own else self.metric not in LOWER_IS_BETTER
        self.facts = {
            "settings": settings.to_dict(),
            "adapter": identity(adapter.first),
            "rows": len(task.train),
            "rows to score": len(task.eval or ()),
        }
        self.saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history.losses)

    def take_up(self) -> None:
        """Go on where the state beside the output says."""
        path = self.folder / FILE
        state = load_state(path)
        check_same(state, self.facts, path)
        if state.history.best is not None and not self.out.is_file():
            raise FileAccessError(
                self.out,
                expected=f"the best adapter so far, of step {state.history.best['step']}",
                found="nothing there",
                remedy="put it back, or begin again with --force in place of --resume",
            )
        self.history = state.history
        self.adapter.load(state.tensors)
        set_moments(self.learner.optimizer, self.learner.learning, state.moments)
        if state.scaler:
            self.learner.precision.scaler.load_state_dict(state.scaler)

    def clear(self) -> None:
        """Make room for a new run."""
        if not self.processes.is_writer:
            return
        self.folder.mkdir(exist_ok=True)
        for path in (self.folder / FILE, self.folder / PICTURE, self.metrics_file, self.out):
            path.unlink(missing_ok=True)

    def go(self, progress: Progress, asked: Callable[[], bool]) -> TrainReport:
        """Train to the end."""
        plan = self.plan
        if self.step == 0 and not self.history.evaluations:
            progress("scoring the untrained adapter", 0, plan.steps)
            self.score()
            self.clear()  # no sooner: a run that cannot begin leaves what it would replace
        outcome = "finished"
        while self.step < plan.steps:
            if self.out_of_patience():
                outcome = "patience"
                break
            progress(self.told(), self.step, plan.steps)
            stop = self.learn(asked)
            if self.step % plan.eval_every == 0 or self.step == plan.steps:
                progress(f"scoring, {self.told()}", self.step, plan.steps)
                self.score()
                self.save()
            elif stop or time.monotonic() - self.saved_at > SAVE_SECONDS:
                self.save()
            if stop and self.step < plan.steps:
                outcome = "interrupted"
                break
        progress(self.told(), self.step, plan.steps)
        report = self.finish(outcome)
        if outcome == "interrupted":
            raise TrainingInterrupted(self.kept())
        return report

    def learn(self, asked: Callable[[], bool]) -> bool:
        """One step; whether anybody was asked to stop."""
        settings, step = self.settings, self.step
        factor = rate_factor(
            step,
            self.plan.steps,
            warmup=settings.warmup or 0.0,
            schedule=settings.schedule or defaults.SCHEDULE,
        )
        for group in self.learner.optimizer.param_groups:
            group["lr"] = group[PEAK] * factor
        found = self.learner.step(step, self.plan.batch(step), asked=asked)
        self.history.losses.append(found.loss)
        self.history.norms.append(found.norm)
        self.history.seconds.append(found.seconds)
        return found.stop

    def score(self) -> None:
        """Score the adapter as it is, and keep it if it is the best; at step 0 it is not kept."""
        if self.task.eval is None:
            self.keep({}, is_best=self.step > 0)
            return
        torch.manual_seed(mixed_seed(self.settings.seed, self.step, 0xE7A1))
        metrics = evaluate(
            self.task.model,
            self.task,
            self.task.eval,
            batch_size=math.ceil(self.plan.batch_size / self.settings.accumulate),
            processes=self.processes,
            precision=self.learner.precision,
        )
        check_metric(self.metric, metrics)
        best = self.history.best
        better = (
            best is None
            or self.settings.keep == "last"
            or is_better(metrics[self.metric], best["metrics"][self.metric], higher=self.higher)
        )
        self.keep(metrics, is_best=better and self.step > 0)

    def keep(self, metrics: dict[str, float], *, is_best: bool) -> None:
        """Note an evaluation; write the adapter if it is the best."""
        if self.processes.is_writer:
            if is_best:
                self.adapter.bundle().save(self.out, force=True)
            scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            kept = "; kept" if is_best else ""
            log.info("step %d of %d: %s%s", self.step, self.plan.steps, scores or "saved", kept)
        self.history.evaluations.append(
            {
                "step": self.step,
                "epoch": self.step / self.plan.per_epoch,
                "metrics": metrics,
                "is_best": is_best,
            }
        )

    def out_of_patience(self) -> bool:
        """Whether so many evaluations came after the best score that there is no hope."""
        patience = self.settings.patience
        if patience is None or self.task.eval is None:
            return False
        scores = [e["metrics"][self.metric] for e in self.history.evaluations if e["step"] > 0]
        best = 0
        for place, score in enumerate(scores):
            if is_better(score, scores[best], higher=self.higher):
                best = place
        return len(scores) - 1 - best >= patience

    def save(self) -> None:
        """Write the state and the report so far."""
        self.saved_at = time.monotonic()
        if not self.processes.is_writer:
            return
        learner = self.learner
        state = State(
            tensors=self.adapter.tensors(),
            moments=moments_of(learner.optimizer, learner.learning),
            history=self.history,
            facts=self.facts,
            scaler=learner.precision.scaler.state_dict(),
        )
        save_state(self.folder / FILE, state)
        write_metrics(self.report("running"), self.metrics_file)

    def finish(self, outcome: str) -> TrainReport:
        """The last files; the model gets the adapter that the bundle holds."""
        report = self.report(outcome)
        if self.history.best is not None and outcome != "interrupted":
            if self.processes.is_writer:
                self.adapter.load_bundle(Bundle.load(self.out))
            self.processes.level(self.adapter.tensors().values())
        self.task.model.eval()
        if not self.processes.is_writer:
            return report
        if self.picture and can_draw():
            draw_curve(report, self.folder / PICTURE)
            report = replace(report, picture=str(self.folder / PICTURE))
        elif self.picture:
            told = "no picture of the learning curve: pip install 'fourierft-export[report]'"
            report = replace(report, notes=(*report.notes, told))
        write_metrics(report, self.metrics_file)
        return report

    def report(self, outcome: str) -> TrainReport:
        """What there is to say now."""
        evaluations, best = self.history.evaluations, self.history.best
        first = self.adapter.first
        before: dict[str, float] = next((e["metrics"] for e in evaluations if e["step"] == 0), {})
        spectra = sum(spectrum.size for spectrum in first.spectra.values())
        learning = sum(p.numel() for p in self.learner.learning.values())
        rates: dict[str, float] = {}  # of the spectra, what most layers have
        for group in sorted(self.learner.optimizer.param_groups, key=lambda g: len(g["params"])):
            rates["spectra" if group["name"] == "spectrum" else "heads"] = group[PEAK]
        written = best is not None and self.out.exists()
        return TrainReport(
            bundle=str(self.out) if written else None,
            bundle_bytes=self.out.stat().st_size if written else 0,
            folder=str(self.folder),
            metrics_file=str(self.metrics_file),
            picture=None,
            metric=self.metric,
            higher_is_better=self.higher,
            before=before,
            best={} if best is None else best["metrics"],
            best_step=0 if best is None else best["step"],
            steps=self.step,
            planned_steps=self.plan.steps,
            steps_per_epoch=self.plan.per_epoch,
            stopped=outcome,
            rows=len(self.task.train),
            eval_rows=len(self.task.eval or ()),
            labels=tuple(self.task.labels),
            parameters={"spectra": spectra, "heads": learning - spectra},
            adapter={
                "layers": len(first.layers),
                "n_frequency": max(layer.n_frequency for layer in first.layers),
                "scaling": first.spec.scaling,
            },
            rates=rates,
            settings=self.settings.to_dict(),
            processes=self.processes.world,
            device=str(self.processes.device),
            history=self.history,
            notes=self.notes,
        )

    def told(self) -> str:
        """Where the run stands, for a progress bar."""
        words = [f"epoch {min(self.step / self.plan.per_epoch, 9999):.2f}"]
        if self.history.losses:
            words.append(f"loss {self.history.losses[-1]:.4g}")
        best = self.history.best
        if best is not None and self.metric in best["metrics"]:
            words.append(f"best {self.metric} {best['metrics'][self.metric]:.4g}")
        return ", ".join(words)

    def kept(self) -> str:
        """What is left after Ctrl-C."""
        best = self.history.best
        state = f"{self.folder} holds step {self.step} of {self.plan.steps}, for --resume"
        if best is None:
            return f"no bundle yet, since there was no evaluation; {state}"
        score = best["metrics"].get(self.metric)
        scored = "" if score is None else f", {self.metric} {score:.4g}"
        return f"{self.out} holds the adapter of step {best['step']}{scored}; {state}"
