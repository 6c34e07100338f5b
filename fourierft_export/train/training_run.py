"""A run from its first step, or from a checkpoint, to its report."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainingArguments

from ..bundle.bundle import Bundle
from ..errors import BadInputError, FileAccessError, UsageError
from ..files.staging import staged_file
from ..types import Progress
from .checkpoint import (
    AGAIN,
    FACTS,
    METRICS,
    PICTURE,
    STATE,
    STEPS,
    folder_of,
    last_checkpoint,
    publish,
    read_history,
)
from .epoch_batches import EpochBatches
from .live_adapter import LiveAdapter, identity
from .report import TrainReport
from .settings import TrainSettings
from .task import TrainingTask
from .trainer import AdapterTrainer

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # between two checkpoints, if no evaluation comes first
CURVE_POINTS = 2000
CURVES = {"step": "step", "loss": "loss", "gradient_norm": "grad_norm", "seconds": "seconds"}
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "error", "mae", "mse", "rmse"})
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run between two steps; the message says what was kept."""


@dataclass(eq=False)
class Run(TrainerCallback):  # type: ignore[misc]
    """A run to its report. It keeps the best adapter in `out` and stops the Trainer in time."""

    task: TrainingTask
    settings: TrainSettings
    adapter: LiveAdapter
    arguments: TrainingArguments
    out: Path
    picture: bool
    notes: tuple[str, ...]
    progress: Progress | None
    interrupted: Callable[[], bool]  # whether Ctrl-C was pressed

    def __post_init__(self) -> None:
        self.folder = folder_of(self.out)  # of the checkpoint, the metrics and the picture
        usual = self.task.metric_for_best_model
        self.metric, higher = self.settings.metric or usual, self.task.greater_is_better
        known = higher is not None and self.metric == usual
        self.higher = bool(higher) if known else self.metric not in LOWER_IS_BETTER
        self.kept_step = 0  # of the adapter in `out`
        self.best: float | None = None
        self.waited = 0  # evaluations since the best one
        self.stopped = "finished"
        self.saved_at = time.monotonic()
        self.began = self.seconds = 0.0

    def train(self, resume: bool) -> TrainReport:
        """Train to the end."""
        settings, task, arguments = self.settings, self.task, self.arguments
        batches = plan(task, settings, arguments)
        self.facts = {
            "settings": settings.to_dict(),
            "adapter": identity(self.adapter.first),
            "rows": len(task.train_dataset),
            "rows to score": len(task.eval_dataset or ()),
            STEPS: batches.steps,
        }
        trainer = AdapterTrainer(task, settings, batches, arguments, [self], self.adapter)
        checkpoint = self.find_checkpoint() if resume else None
        if self.progress is not None:
            self.progress("scoring the untrained adapter", 0, arguments.max_steps)
        if checkpoint is not None:
            arguments.eval_on_start = False
            trainer.state = type(trainer.state).load_from_json(str(checkpoint / STATE))
        if self.is_hopeless:
            self.stopped = "patience"
        elif trainer.state.global_step < arguments.max_steps:
            try:
                trainer.train(checkpoint and str(checkpoint))
            except UnpicklingError as error:  # of `torch.load`, which runs no code from a file
                raise BadInputError(
                    checkpoint or self.folder,
                    expected="a checkpoint of tensors and numbers",
                    found="other objects, which could run code if they were loaded",
                    remedy=AGAIN,
                ) from error
        return self.finish(trainer)

    def find_checkpoint(self) -> Path:
        """Checks the checkpoint to resume from and returns its folder."""
        checkpoint = last_checkpoint(self.out)
        self.judge(read_history(checkpoint, self.facts))
        if self.task.eval_dataset is None:  # the last adapter is the one that is kept
            self.kept_step = int(checkpoint.name.rpartition("-")[2])
        if f"checkpoint-{self.kept_step}" == checkpoint.name and self.arguments.process_index == 0:
            publish(checkpoint, self.out)  # killed between the two
        elif self.kept_step and not self.out.is_file():
            raise FileAccessError(
                self.out,
                expected=f"the best adapter so far, of step {self.kept_step}",
                found="nothing there",
                remedy=f"put it back, or {AGAIN}",
            )
        return checkpoint

    def on_train_begin(self, _args: Any, state: Any, *_others: Any, **_more: Any) -> None:
        """Report where the run begins."""
        self.judge(state.log_history)
        self.report_progress(state)

    def on_step_begin(self, _args: Any, state: Any, *_others: Any, **_more: Any) -> None:
        """Make room for a new run, which nothing can hinder any more; start the clock of a step."""
        if state.global_step == 0 and state.is_world_process_zero:
            for path in (self.folder / PICTURE, self.folder / METRICS, self.out):
                path.unlink(missing_ok=True)
            for path in self.folder.glob("checkpoint-*"):
                shutil.rmtree(path)
            with staged_file(self.folder / FACTS, force=True) as partial:
                partial.write_text(json.dumps(self.facts), "utf-8")
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Save in good time; stop after Ctrl-C, of which all processes hear."""
        self.seconds = time.perf_counter() - self.began
        own = [self.interrupted(), time.monotonic() - self.saved_at > SAVE_SECONDS]
        counts = reduce(torch.tensor(own, dtype=torch.int32, device=args.device), "sum")
        stop, due = (count > 0 for count in counts.tolist())
        if stop and state.global_step < state.max_steps:
            self.stopped, control.should_training_stop = "interrupted", True
        control.should_save |= stop or due
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True  # transformers before 5.23 leaves the last step out
        self.report_progress(state)

    def on_log(self, _args: Any, state: Any, *_others: Any, logs: Any = None, **_more: Any) -> None:
        """Note the seconds of a step with its loss."""
        if logs and "loss" in logs:
            state.log_history[-1]["seconds"] = self.seconds

    def on_evaluate(
        self, _args: Any, state: Any, control: Any, metrics: dict[str, float], **_others: Any
    ) -> None:
        """Decide whether this adapter is kept, and whether there is hope for a better one."""
        found = scores(metrics)
        if self.metric not in found:
            raise UsageError("metric", expected="one of " + ", ".join(found), found=self.metric)
        kept = self.judge(state.log_history)[-1]["is_best"]
        if state.is_world_process_zero:
            text = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            text += "; kept" if kept else ""
            log.info("step %d of %d: %s", state.global_step, state.max_steps, text)
        if self.is_hopeless and state.global_step < state.max_steps:
            self.stopped, control.should_training_stop = "patience", True

    def on_save(self, args: Any, state: Any, _control: Any, **_others: Any) -> None:
        """Write the output if the checkpoint's adapter is the one to keep."""
        self.saved_at = time.monotonic()
        if args.eval_strategy == "no":
            self.kept_step = state.global_step
        if self.kept_step == state.global_step and state.is_world_process_zero:
            publish(self.folder / f"checkpoint-{state.global_step}", self.out)

    def judge(self, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The evaluations in the Trainer's log, each with `is_best`: it was kept at that time."""
        found, sign = evaluations(history), 1 if self.higher else -1
        self.best, self.waited, top = None, 0, -math.inf
        for one in found:
            one["is_best"] = False
            if one["step"]:
                value = one["metrics"][self.metric]
                quality = -math.inf if math.isnan(value) else sign * value
                better = self.best is None or quality > top
                if better:
                    self.best, top = value, quality
                self.waited = 0 if better else self.waited + 1
                one["is_best"] = better or self.settings.keep == "last"
            self.kept_step = one["step"] if one["is_best"] else self.kept_step
        return found

    @property
    def is_hopeless(self) -> bool:
        """Whether `patience` evaluations came after the best one."""
        return self.waited >= (self.settings.patience or math.inf)

    def report_progress(self, state: Any) -> None:
        """Report where the run stands, for a progress bar."""
        words = [f"epoch {state.epoch or 0:.2f}"]
        losses = [entry["loss"] for entry in state.log_history[-3:] if "loss" in entry]
        words += [f"loss {losses[-1]:.4g}"] if losses else []
        words += [] if self.best is None else [f"best {self.metric} {self.best:.4g}"]
        if self.progress is not None:
            self.progress(", ".join(words), state.global_step, state.max_steps)

    def finish(self, trainer: AdapterTrainer) -> TrainReport:
        """Write the last files; the model gets the adapter that the bundle holds."""
        report = self.report(trainer)
        writes, metrics_file = trainer.is_world_process_zero(), self.folder / METRICS
        if self.stopped == "interrupted":
            if writes:
                report.write(metrics_file)
            score = report.best.get(report.metric)
            scored = "" if score is None else f", {report.metric} {score:.4g}"
            kept = f"{self.out} holds the adapter of step {report.best_step}{scored}"
            kept = kept if report.bundle else "no bundle yet, since there was no evaluation"
            state = f"{self.folder} holds step {report.steps} of {report.planned_steps}"
            raise TrainingInterrupted(f"{kept}; {state}, for --resume")
        trainer.accelerator.wait_for_everyone()
        if report.bundle is not None:
            self.adapter.load(Bundle.load(self.out))
        self.task.model.eval()
        if not writes:
            return report
        if self.picture and find_spec("matplotlib") is not None:
            report.draw(self.folder / PICTURE)
            report = replace(report, picture=str(self.folder / PICTURE))
        elif self.picture:
            note = "no picture of the learning curve: pip install 'fourierft-export[report]'"
            report = replace(report, notes=(*report.notes, note))
        report.write(metrics_file)
        return report

    def report(self, trainer: AdapterTrainer) -> TrainReport:
        """Collects the report of the run as it stands."""
        first, history = self.adapter.first, trainer.state.log_history
        found, kept = self.judge(history), self.kept_step
        logged = [entry for entry in history if "loss" in entry]
        spectra = sum(spectrum.size for spectrum in first.spectra.values())
        learning = sum(p.numel() for p in self.adapter.learning())
        rates: dict[str, float] = {}  # of the spectra, what most layers have
        groups = getattr(trainer.optimizer, "param_groups", ())
        for group in sorted(groups, key=lambda g: len(g["params"])):
            rates["spectra" if group["name"] == "spectrum" else "heads"] = group["initial_lr"]
        written = self.out.is_file() and kept > 0
        return TrainReport(
            bundle=str(self.out) if written else None,
            bundle_bytes=self.out.stat().st_size if written else 0,
            folder=str(self.folder),
            metrics_file=str(self.folder / METRICS),
            picture=None,
            metric=self.metric,
            higher_is_better=self.higher,
            before=next((e["metrics"] for e in found if e["step"] == 0), {}),
            best=next((e["metrics"] for e in reversed(found) if e["step"] == kept), {}),
            best_step=kept,
            steps=trainer.state.global_step,
            planned_steps=trainer.args.max_steps,
            steps_per_epoch=trainer.batches.steps,
            stopped=self.stopped,
            rows=len(self.task.train_dataset),
            eval_rows=len(self.task.eval_dataset or ()),
            labels=tuple(self.task.labels),
            parameters={"spectra": spectra, "heads": learning - spectra},
            adapter={
                "layers": len(first.layers),
                "n_frequency": max(layer.n_frequency for layer in first.layers),
                "scaling": first.spec.scaling,
            },
            rates=rates,
            settings=self.settings.to_dict(),
            processes=trainer.args.world_size,
            device=str(trainer.args.device),
            evaluations=found,
            curves={
                name: [entry.get(key, 0.0) for entry in logged] for name, key in CURVES.items()
            },
            notes=self.notes,
        )


def plan(task: TrainingTask, settings: TrainSettings, arguments: TrainingArguments) -> EpochBatches:
    """This process's share of the rows; the Trainer's arguments get the steps that follow."""
    batches = EpochBatches(
        len(task.train_dataset),
        settings.batch_size or 1,
        seed=settings.seed,
        lengths=task.lengths if settings.group_lengths else None,
        parts=settings.accumulate,
        rank=arguments.process_index,
        world=arguments.world_size,
    )
    arguments.max_steps = steps = _steps(batches, settings)
    arguments.logging_steps = max(1, steps // CURVE_POINTS)
    arguments.save_steps = arguments.eval_steps = settings.eval_every or batches.steps
    arguments.eval_on_start = task.eval_dataset is not None
    arguments.eval_strategy = "steps" if arguments.eval_on_start else "no"
    arguments.per_device_eval_batch_size = max(1, batches.batch_size // settings.accumulate)
    return batches


def count_steps(rows: int, settings: TrainSettings) -> int:
    """The steps of a run in one process, on so many rows."""
    batch_size, parts = settings.batch_size or 1, settings.accumulate
    return _steps(EpochBatches(rows, batch_size, seed=0, parts=parts), settings)


def _steps(batches: EpochBatches, settings: TrainSettings) -> int:
    return settings.steps or max(1, round((settings.epochs or 1) * batches.steps))


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scores among what the Trainer calls metrics, without its prefix and times."""
    found = {k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_")}
    return {name: float(value) for name, value in found.items() if name not in _TIMES}


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among what the Trainer logged: step, epoch, metrics."""
    return [
        {"step": e["step"], "epoch": e.get("epoch") or 0.0, "metrics": scores(e)}
        for e in history
        if any(key.startswith("eval_") for key in e)
    ]
