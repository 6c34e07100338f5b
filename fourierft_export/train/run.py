"""A run from its first step, or from a checkpoint, to its report."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..bundle.file import Bundle
from ..errors import BadInputError, FileAccessError, UsageError
from ..files.container import read_header
from ..files.staging import staged_file
from ..types import Progress
from .adapter import LiveAdapter, identity
from .batches import EpochBatches
from .callback import ADAPTER_FILE
from .report import TrainReport, draw_curve, write_metrics
from .run_callback import RunCallback, publish
from .settings import TrainSettings
from .task import TrainingTask
from .trainer import AdapterTrainer

FOLDER_SUFFIX = ".train"
METRICS, PICTURE, FACTS = "metrics.json", "curve.png", "run.json"
STATE = "trainer_state.json"
CURVE_POINTS = 2000
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "error", "mae", "mse", "rmse"})
STEPS = "steps of an epoch, which also follow from --accumulate and the number of processes"
PLAN = ("rows", "rows to score", STEPS)
# Settings that may differ when a run is resumed: they change how, not what, is computed.
FREE = frozenset({"device", "eval_every", "patience", "report_to", "threads"})
FREE |= {"accumulate", "gradient_checkpointing"}


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run between two steps; the message says what was kept."""


@dataclass
class Run:
    """A run from its first step, or a checkpoint, to its report."""

    task: TrainingTask
    settings: TrainSettings
    adapter: LiveAdapter
    arguments: TrainingArguments
    out: Path
    metrics_file: Path
    picture: bool
    notes: tuple[str, ...]

    def train(self, resume: bool, progress: Progress, interrupted: Any) -> TrainReport:
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
        metric, higher = settings.metric or task.metric_for_best_model, task.greater_is_better
        if higher is None or metric != task.metric_for_best_model:
            higher = metric not in LOWER_IS_BETTER
        progress = progress if arguments.process_index == 0 else silent
        callback = RunCallback(
            self.out, settings, metric, higher, progress, interrupted, self.clear
        )
        trainer = AdapterTrainer(task, settings, batches, arguments, [callback], self.adapter)
        checkpoint = self.find_checkpoint(callback) if resume else None
        arguments.eval_on_start &= checkpoint is None
        progress("scoring the untrained adapter", 0, arguments.max_steps)
        if checkpoint is not None:
            trainer.state = type(trainer.state).load_from_json(str(checkpoint / STATE))
        steps = trainer.state.global_step
        if callback.is_hopeless:
            callback.stopped = "patience"
        elif steps < arguments.max_steps:
            trainer.train(checkpoint and str(checkpoint))
        return self.finish(trainer, callback)

    @property
    def folder(self) -> Path:
        """Where the checkpoint, the metrics and the picture lie."""
        return folder_of(self.out)

    def clear(self) -> None:
        """Make room for a new run."""
        for path in (self.folder / PICTURE, self.metrics_file, self.out):
            path.unlink(missing_ok=True)
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        with staged_file(self.folder / FACTS, force=True) as partial:
            partial.write_text(json.dumps(self.facts), "utf-8")

    def find_checkpoint(self, callback: RunCallback) -> Path:
        """Checks the checkpoint to resume from and returns its folder."""
        checkpoint = last_checkpoint(self.out)
        again = "begin again with --force in place of --resume"
        for path in checkpoint.glob("*.p*"):
            if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip():
                raise BadInputError(path, expected="a whole file", remedy=again)
        for path in checkpoint.glob("*.safetensors"):
            read_header(path)
        Bundle.load(checkpoint / ADAPTER_FILE)
        try:
            before = json.loads((self.folder / FACTS).read_text("utf-8"))
            callback.judge(json.loads((checkpoint / STATE).read_text("utf-8"))["log_history"])
            check_same_run(before, self.facts, self.folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found = f"one that lacks something: {error!r}"
            raise BadInputError(
                self.folder, expected="the whole state of a run", found=found, remedy=again
            ) from error
        if self.task.eval_dataset is None:  # the last adapter is the one that is kept
            callback.kept_step = int(checkpoint.name.rpartition("-")[2])
        kept = callback.kept_step
        if f"checkpoint-{kept}" == checkpoint.name and self.arguments.process_index == 0:
            publish(checkpoint, self.out)  # killed between the two
        elif kept and not self.out.is_file():
            raise FileAccessError(
                self.out,
                expected=f"the best adapter so far, of step {kept}",
                found="nothing there",
                remedy=f"put it back, or {again}",
            )
        return checkpoint

    def finish(self, trainer: AdapterTrainer, callback: RunCallback) -> TrainReport:
        """Write the last files; the model gets the adapter that the bundle holds."""
        report = self.report(trainer, callback)
        writes = trainer.is_world_process_zero()
        if callback.stopped == "interrupted":
            if writes:
                write_metrics(report, self.metrics_file)
            raise TrainingInterrupted(self.kept_after_interrupt(report))
        if is_distributed():
            torch.distributed.barrier()
        if report.bundle is not None:
            self.adapter.load(Bundle.load(self.out))
        self.task.model.eval()
        if not writes:
            return report
        if self.picture and find_spec("matplotlib") is not None:
            draw_curve(report, self.folder / PICTURE)
            report = replace(report, picture=str(self.folder / PICTURE))
        elif self.picture:
            note = "no picture of the learning curve: pip install 'fourierft-export[report]'"
            report = replace(report, notes=(*report.notes, note))
        write_metrics(report, self.metrics_file)
        return report

    def report(self, trainer: AdapterTrainer, callback: RunCallback) -> TrainReport:
        """Collects the report of the run as it stands."""
        first = self.adapter.first
        found = callback.judge(trainer.state.log_history)
        kept = callback.kept_step
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        spectra = sum(spectrum.size for spectrum in first.spectra.values())
        learning = sum(p.numel() for p in self.adapter.learning())
        rates: dict[str, float] = {}  # of the spectra, what most layers have
        groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
        for group in sorted(groups, key=lambda g: len(g["params"])):
            rates["spectra" if group["name"] == "spectrum" else "heads"] = group["initial_lr"]
        written = self.out.is_file() and kept > 0
        return TrainReport(
            bundle=str(self.out) if written else None,
            bundle_bytes=self.out.stat().st_size if written else 0,
            folder=str(self.folder),
            metrics_file=str(self.metrics_file),
            picture=None,
            metric=callback.metric,
            higher_is_better=callback.higher,
            before=next((e["metrics"] for e in found if e["step"] == 0), {}),
            best=next((e["metrics"] for e in reversed(found) if e["step"] == kept), {}),
            best_step=kept,
            steps=trainer.state.global_step,
            planned_steps=trainer.args.max_steps,
            steps_per_epoch=trainer.batches.steps,
            stopped=callback.stopped,
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
                "step": [entry["step"] for entry in logged],
                "loss": [entry["loss"] for entry in logged],
                "gradient_norm": [entry.get("grad_norm", 0.0) for entry in logged],
                "seconds": [entry.get("seconds", 0.0) for entry in logged],
            },
            notes=self.notes,
        )

    def kept_after_interrupt(self, report: TrainReport) -> str:
        """The message after Ctrl-C: what the bundle and the folder hold."""
        step = f"step {report.steps} of {report.planned_steps}"
        state = f"{self.folder} holds {step}, for --resume"
        if report.bundle is None:
            return f"no bundle yet, since there was no evaluation; {state}"
        score = report.best.get(report.metric)
        scored = "" if score is None else f", {report.metric} {score:.4g}"
        return f"{self.out} holds the adapter of step {report.best_step}{scored}; {state}"


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
    steps = settings.steps or max(1, round((settings.epochs or 1) * batches.steps))
    arguments.max_steps = steps
    arguments.logging_steps = max(1, steps // CURVE_POINTS)
    arguments.save_steps = arguments.eval_steps = settings.eval_every or batches.steps
    arguments.eval_on_start = task.eval_dataset is not None
    arguments.eval_strategy = "steps" if arguments.eval_on_start else "no"
    arguments.per_device_eval_batch_size = max(1, batches.batch_size // settings.accumulate)
    return batches


def folder_of(out: str | os.PathLike[str]) -> Path:
    """Where the checkpoint, metrics and picture of a run lie: beside its bundle."""
    path = Path(out)
    return path.with_name(path.name + FOLDER_SUFFIX)


def last_checkpoint(out: str | os.PathLike[str]) -> Path:
    """The newest whole checkpoint of a run; `trainer_state.json` is written last into one."""
    found = {}
    for path in folder_of(out).glob("checkpoint-*"):
        try:
            json.loads((path / STATE).read_text("utf-8"))
            found[int(path.name.partition("-")[2])] = path
        except (OSError, ValueError):
            continue
    if not found:
        raise FileAccessError(
            folder_of(out),
            expected="the checkpoint of a run that was stopped",
            found="none",
            remedy="leave --resume out to begin one",
        )
    return found[max(found)]


def check_same_run(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to resume with another model, data, settings or plan than the run began with."""
    old, new = before["settings"], now["settings"]
    wrong = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted({*old, *new} - FREE)
        if old.get(key) != new.get(key)
    ]
    if before["adapter"] != now["adapter"]:
        wrong.append("adapter: another than then")
    for key in PLAN:
        if not wrong and before[key] != now[key]:
            wrong.append(f"{key}: {before[key]} then, {now[key]} now")
    if wrong:
        raise UsageError(
            where,
            expected="the settings, model and data that the run began with",
            found=f"{len(wrong)} that differ",
            remedy="give the same ones, or begin again with --force in place of --resume",
            offenders=wrong,
        )


def is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""
