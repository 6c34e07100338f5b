"""`train_adapter`: rows and a model to a bundle that always holds the best adapter so far."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapt.attach import detach
from ..adapt.modules import adapter_names, check_new_name
from ..bundle.file import Bundle
from ..bundle.peft import BundleSource
from ..errors import BadInputError, FileAccessError, FourierFTError, UsageError, missing_extra
from ..files.container import read_header
from ..files.staging import check_output, staged_file
from ..types import Progress
from . import defaults
from .adapter import (
    NAME,
    LiveAdapter,
    check_settings_of_training,
    continued_adapter,
    identity,
    new_adapter,
)
from .batches import EpochBatches
from .report import TrainReport, draw_curve, write_metrics
from .settings import TrainSettings
from .task import TrainingTask

try:
    from transformers import TrainingArguments

    from .callback import ADAPTER_FILE, WEIGHTS_FILE
    from .run_callback import (
        LOWER_IS_BETTER,
        RunCallback,
        best_of,
        ctrl_c_noted,
        evaluations,
        publish,
    )
    from .trainer import OTHER_OUTPUTS, AdapterTrainer, cast_frozen_linears
except ImportError as error:
    raise missing_extra(str(error.name), "hf", "training an adapter") from None

FOLDER_SUFFIX = ".train"
METRICS, PICTURE, FACTS = "metrics.json", "curve.png", "run.json"
STATE = "trainer_state.json"
CURVE_POINTS = 2000
# Settings that may differ when a run goes on: they change how, not what, is computed.
FREE = frozenset(
    {
        "accumulate",
        "device",
        "eval_every",
        "gradient_checkpointing",
        "patience",
        "report_to",
        "threads",
    }
)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run between two steps; the message says what was kept."""


def train_adapter(
    task: TrainingTask,
    out: str | os.PathLike[str],
    settings: TrainSettings | None = None,
    *,
    bundle: BundleSource | None = None,
    resume: bool = False,
    force: bool = False,
    allow_base_mismatch: bool = False,
    metrics: str | os.PathLike[str] | None = None,
    picture: bool = True,
    progress: Progress | None = None,
) -> TrainReport:
    """Train an adapter with transformers' Trainer; write it as a bundle, always the best so far.

    Beside the bundle, `OUT.train/` holds the Trainer's last checkpoint, from which `resume` goes
    on, `metrics.json` and `curve.png`. The bundle is the old file or the new one, whenever the
    process dies. Under `torchrun` or `accelerate launch` all processes train together.

    Args:
        task: the model and its rows. The model is changed: it keeps the adapter "default", as the
            bundle has it, unless the run ends early; a dtype other than float32 casts its frozen
            linear layers.
        out: the bundle, *.fourierft.safetensors by custom.
        settings: how; by default the rules of `train.defaults`.
        bundle: train this adapter further rather than a new one.
        resume: go on with the run whose checkpoint lies beside `out`; in one process on the CPU
            the result is, bit for bit, that of a run that was never stopped.
        force: replace `out` and its folder.
        allow_base_mismatch: accept a `bundle` that was trained on other base weights.
        metrics: where to write the report as JSON; by default in the folder.
        picture: draw the learning curve, where matplotlib is installed.
        progress: called with (what, done, total).

    Returns:
        Scores before and after, sizes, times, curves.

    Raises:
        UsageError: settings that do not fit the model or each other; `out` exists without
            `force`; a loss that is not finite (the bundle stays as it was).
        BaseMismatchError: `bundle` does not belong to the model.
        BadInputError, FileAccessError: the checkpoint to resume from, or the outputs.
        TrainingInterrupted: Ctrl-C; a `KeyboardInterrupt` that says what was kept.
    """
    settings = settings or TrainSettings()
    if bundle is not None:
        check_settings_of_training(settings)
    settings = resolved(settings)
    check_outputs(out, metrics, resume=resume, force=force)
    check_new_name(task.model, NAME)
    if not len(task.train_dataset):
        raise UsageError("training rows", expected="at least one", found="none")
    with ExitStack() as stack:
        stack.enter_context(_detached_after_failure(task.model))
        stack.enter_context(_own_randomness())
        stack.enter_context(_threads(settings.threads))
        arguments = make_arguments(settings, folder_of(out))
        stack.enter_context(_processes(arguments))
        interrupted = stack.enter_context(ctrl_c_noted())
        task, note = with_rows_to_score(task, settings)
        run = Run(
            task=task,
            settings=settings,
            adapter=put_adapter(task, settings, bundle, allow_base_mismatch),
            arguments=arguments,
            out=Path(out),
            metrics_file=Path(metrics or folder_of(out) / METRICS),
            picture=picture,
            notes=(*task.notes, *note),
        )
        return run.train(resume, progress or _silent, interrupted)


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
        metric = settings.metric or task.metric_for_best_model
        higher = task.greater_is_better if metric == task.metric_for_best_model else None
        callback = RunCallback(
            self.out,
            settings,
            metric,
            metric not in LOWER_IS_BETTER if higher is None else higher,
            progress if arguments.process_index == 0 else _silent,
            interrupted,
            self.clear,
        )
        trainer = AdapterTrainer(self.adapter, task, settings, batches, arguments, [callback])
        checkpoint = self.find_checkpoint(callback) if resume else None
        arguments.eval_on_start &= checkpoint is None
        callback.progress("scoring the untrained adapter", 0, arguments.max_steps)
        if checkpoint is None or not self.is_over(trainer, callback, checkpoint):
            trainer.train(checkpoint and str(checkpoint), ignore_keys_for_eval=OTHER_OUTPUTS)
        return self.finish(trainer, callback)

    @property
    def folder(self) -> Path:
        """Where the checkpoint, the metrics and the picture lie."""
        return folder_of(self.out)

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same when the run goes on."""
        return {
            "settings": self.settings.to_dict(),
            "adapter": identity(self.adapter.first),
            "rows": len(self.task.train_dataset),
            "rows to score": len(self.task.eval_dataset or ()),
        }

    def clear(self) -> None:
        """Make room for a new run."""
        for path in (self.folder / PICTURE, self.metrics_file, self.out):
            path.unlink(missing_ok=True)
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        with staged_file(self.folder / FACTS, force=True) as partial:
            partial.write_text(json.dumps(self.facts), "utf-8")

    def find_checkpoint(self, callback: RunCallback) -> Path:
        """The checkpoint to go on from."""
        checkpoint = last_checkpoint(self.out)
        for path in checkpoint.glob("*.p*"):
            if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip():
                raise BadInputError(
                    path, expected="a whole file", remedy="begin again with --force"
                )
        read_header(checkpoint / WEIGHTS_FILE)
        Bundle.load(checkpoint / ADAPTER_FILE)
        try:
            before = json.loads((self.folder / FACTS).read_text("utf-8"))
            history = json.loads((checkpoint / STATE).read_text("utf-8"))["log_history"]
            check_same_run(before, self.facts, self.folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(
                self.folder,
                expected="the whole state of a run",
                found=f"one that lacks something: {error!r}",
                remedy="begin again with --force",
            ) from error
        kept = _kept_step(history, callback)
        if f"checkpoint-{kept}" == checkpoint.name and self.arguments.process_index == 0:
            publish(checkpoint, self.out)  # killed between the two
        elif kept and not self.out.is_file():
            raise FileAccessError(
                self.out,
                expected=f"the best adapter so far, of step {kept}",
                found="nothing there",
                remedy="put it back, or begin again with --force in place of --resume",
            )
        return checkpoint

    def is_over(self, trainer: AdapterTrainer, callback: RunCallback, checkpoint: Path) -> bool:
        """Whether there is nothing left to do after a checkpoint; its state is loaded then."""
        trainer.state = type(trainer.state).load_from_json(str(checkpoint / STATE))
        hopeless = self.task.eval_dataset is not None and callback.is_hopeless(trainer.state)
        callback.stopped = "patience" if hopeless else "finished"
        return hopeless or trainer.state.global_step >= trainer.args.max_steps

    def finish(self, trainer: AdapterTrainer, callback: RunCallback) -> TrainReport:
        """Write the last files; the model gets the adapter that the bundle holds."""
        report = self.report(trainer, callback)
        writes = trainer.is_world_process_zero()
        if callback.stopped == "interrupted":
            if writes:
                write_metrics(report, self.metrics_file)
            raise TrainingInterrupted(self.kept_after_interrupt(report))
        if _distributed():
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
        """What there is to say now."""
        history, first = trainer.state.log_history, self.adapter.first
        found = evaluations(history)
        kept = _kept_step(history, callback) if found else callback.kept_step
        best: float | None = None
        for one in found:
            value = one["metrics"].get(callback.metric, 0.0)
            values = [value] if best is None else [best, value]
            one["is_best"] = one["step"] > 0 and (
                self.settings.keep == "last"
                or best is None
                or best_of(values, callback.higher) == 1
            )
            best = value if one["is_best"] else best
        logged = [entry for entry in history if "loss" in entry]
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
        """What is left after Ctrl-C."""
        step = f"step {report.steps} of {report.planned_steps}"
        state = f"{self.folder} holds {step}, for --resume"
        if report.bundle is None:
            return f"no bundle yet, since there was no evaluation; {state}"
        score = report.best.get(report.metric)
        scored = "" if score is None else f", {report.metric} {score:.4g}"
        return f"{self.out} holds the adapter of step {report.best_step}{scored}; {state}"


def _kept_step(history: list[Any], callback: RunCallback) -> int:
    """The step of the adapter in the bundle, by what the Trainer has logged."""
    found = [e for e in evaluations(history) if e["step"]]
    if not found:
        return 0
    values = [e["metrics"][callback.metric] for e in found]
    last = callback.settings.keep == "last"
    return int(found[-1 if last else best_of(values, callback.higher)]["step"])


def resolved(settings: TrainSettings) -> TrainSettings:
    """The settings with every default that needs no model worked out."""

    def chosen(value: Any, default: Any) -> Any:
        return default if value is None else value

    return replace(
        settings,
        epochs=None if settings.steps else chosen(settings.epochs, defaults.EPOCHS),
        batch_size=chosen(settings.batch_size, max(defaults.BATCH_SIZE, settings.accumulate)),
        head_learning_rate=chosen(settings.head_learning_rate, defaults.HEAD_LEARNING_RATE),
        warmup=chosen(settings.warmup, defaults.WARMUP),
        schedule=chosen(settings.schedule, defaults.SCHEDULE),
        max_grad_norm=chosen(settings.max_grad_norm, defaults.MAX_GRAD_NORM),
        init_weights=chosen(settings.init_weights, defaults.INIT_ZEROS),
    )


def make_arguments(settings: TrainSettings, folder: Path) -> TrainingArguments:
    """The Trainer's arguments, as far as they follow from the settings alone."""
    kind = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=kind)
    # An unknown name, a build without that device, a machine without it: torch's errors differ.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device {kind}",
            expected="a device that this machine and this build of torch have",
            found=str(error).splitlines()[0],
            remedy="use --device cpu",
        ) from error
    if settings.dtype == "float16" and kind == "cpu":
        raise UsageError("dtype float16", expected="a GPU", found="cpu", remedy="use bfloat16")
    if kind.startswith("cuda:"):
        torch.cuda.set_device(kind)
    report_to = settings.report_to or ()
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=kind == "cpu",
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        seed=settings.seed,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.accumulate,
        save_strategy="steps",
        save_total_limit=1,
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        report_to=[report_to] if isinstance(report_to, str) else list(report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_broadcast_buffers=False,
        log_level="error",
    )


def plan(task: TrainingTask, settings: TrainSettings, arguments: TrainingArguments) -> EpochBatches:
    """This process's share of the rows; the Trainer's arguments get the steps that follow."""
    batches = EpochBatches(
        len(task.train_dataset),
        settings.batch_size or defaults.BATCH_SIZE,
        seed=settings.seed,
        lengths=task.lengths if settings.group_lengths else None,
        parts=settings.accumulate,
        rank=arguments.process_index,
        world=arguments.world_size,
    )
    steps = settings.steps or max(1, round((settings.epochs or 1) * batches.steps))
    scored = task.eval_dataset is not None
    arguments.max_steps = steps
    arguments.logging_steps = max(1, steps // CURVE_POINTS)
    arguments.save_steps = arguments.eval_steps = settings.eval_every or batches.steps
    arguments.eval_strategy = "steps" if scored else "no"
    arguments.eval_on_start = scored
    arguments.per_device_eval_batch_size = max(1, batches.batch_size // settings.accumulate)
    return batches


def put_adapter(
    task: TrainingTask,
    settings: TrainSettings,
    bundle: BundleSource | None,
    allow_base_mismatch: bool,
) -> LiveAdapter:
    """Put the adapter that learns on the task's model, everything else ready for it."""
    if settings.gradient_checkpointing:
        _save_memory(task.model)
    torch.manual_seed(settings.seed)
    if bundle is None:
        adapter = new_adapter(task, settings)
    else:
        adapter = continued_adapter(task, bundle, allow_base_mismatch=allow_base_mismatch)
    if settings.dtype != "float32":
        for parameter in adapter.learning():  # in half precision small steps would be lost
            parameter.data = parameter.data.float()
        cast_frozen_linears(task.model, getattr(torch, settings.dtype))
    return adapter


def _save_memory(model: nn.Module) -> None:
    """Turn on gradient checkpointing."""
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise UsageError(
            "gradient_checkpointing",
            expected="a model with gradient_checkpointing_enable(), as those of transformers",
            found=type(model).__name__,
            remedy="leave the option out; --accumulate saves memory with any model",
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def with_rows_to_score(
    task: TrainingTask, settings: TrainSettings
) -> tuple[TrainingTask, tuple[str, ...]]:
    """The task; of its training rows some are held out if it has none to score."""
    rows: Any = task.train_dataset
    count = len(rows)
    if task.eval_dataset is not None or not settings.eval_share or count < 2:
        return (task if task.eval_dataset else replace(task, eval_dataset=None)), ()
    order = np.random.default_rng(settings.seed).permutation(count)
    held = min(max(1, round(count * settings.eval_share)), count - 1)
    scored, learnt = np.sort(order[:held]).tolist(), np.sort(order[held:]).tolist()
    subset: Any = torch.utils.data.Subset
    task = replace(
        task,
        train_dataset=subset(rows, learnt),
        eval_dataset=subset(rows, scored),
        lengths=None if task.lengths is None else [task.lengths[i] for i in learnt],
    )
    return task, (f"no rows to score were given: {held} of {count} training rows are held out",)


def folder_of(out: str | os.PathLike[str]) -> Path:
    """Where the checkpoint, metrics and picture of a run lie: beside its bundle."""
    path = Path(out)
    return path.with_name(path.name + FOLDER_SUFFIX)


def last_checkpoint(out: str | os.PathLike[str]) -> Path:
    """The newest whole checkpoint of a run; `trainer_state.json` is written last into one."""
    found = {}
    for path in folder_of(out).glob("checkpoint-*"):
        try:
            found[int(path.name.partition("-")[2])] = path
            json.loads((path / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            found.pop(int(path.name.partition("-")[2]), None)
    if not found:
        raise FileAccessError(
            folder_of(out),
            expected="the checkpoint of a run that was stopped",
            found="none",
            remedy="leave --resume out to begin one",
        )
    return found[max(found)]


def check_same_run(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to go on with another model, data or settings than the run began with."""
    old, new = before["settings"], now["settings"]
    wrong = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted({*old, *new} - FREE)
        if old.get(key) != new.get(key)
    ]
    wrong += [
        f"{key}: another than then" for key in now if key != "settings" and before[key] != now[key]
    ]
    if wrong:
        raise UsageError(
            where,
            expected="the settings, model and data that the run began with",
            found=f"{len(wrong)} that differ",
            remedy="give the same ones, or begin again with --force in place of --resume",
            offenders=wrong,
        )


def check_outputs(
    out: str | os.PathLike[str],
    metrics: str | os.PathLike[str] | None = None,
    *,
    resume: bool,
    force: bool,
    inputs: tuple[str | os.PathLike[str], ...] = (),
) -> None:
    """Refuse outputs that exist, before anything slow begins."""
    if resume and force:
        raise UsageError(
            "resume, force", expected="one of them", found="both", remedy="leave one out"
        )
    check_output(out, force=force or resume, inputs=inputs)
    folder = folder_of(out)
    # A run that was stopped before its first checkpoint left nothing worth keeping.
    empty = folder.is_dir() and {path.name for path in folder.iterdir()} <= {FACTS}
    check_output(folder, force=force or resume or empty, inputs=inputs)
    if metrics is not None:
        check_output(metrics, force=force or resume, inputs=(*inputs, out, folder / FACTS))
    files = [path for path in (out, metrics) if path is not None and os.path.isdir(path)]
    if files or (folder.exists() and not folder.is_dir()):
        raise FileAccessError(
            (files or [folder])[0],
            expected="a file to write" if files else "a folder to write to",
            found="a folder" if files else "a file",
            remedy="choose another output",
        )
    if resume:
        last_checkpoint(out)


@contextmanager
def _detached_after_failure(model: nn.Module) -> Iterator[None]:
    """Take the adapter off again if the run ends early, so that the model can go on with it."""
    try:
        yield
    except BaseException:
        if NAME in adapter_names(model):
            detach(model, NAME)
        raise


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the global generators of torch, numpy and Python as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _processes(arguments: TrainingArguments) -> Iterator[None]:
    """Join the processes that a launcher started, and leave them at the end."""
    owned = not _distributed()
    arguments.device  # noqa: B018 - joins them
    arguments._n_gpu = min(1, arguments._n_gpu)  # one process uses one GPU
    try:
        yield
    except RuntimeError as error:
        if arguments.world_size == 1:
            raise
        raise FourierFTError(
            f"process {arguments.process_index} of {arguments.world_size}",
            expected="all processes to go on together",
            found=(str(error).splitlines() or [""])[0],
            remedy="what was saved last is intact; see what the other ones said, then resume",
        ) from error
    finally:
        if owned and _distributed():
            torch.distributed.destroy_process_group()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""
