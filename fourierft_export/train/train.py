"""`train_adapter`: rows and a model to a bundle that always holds the best adapter so far."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapt.attach import detach
from ..adapt.modules import adapter_names, check_new_name
from ..bundle.file import Bundle
from ..errors import FileAccessError, UsageError
from ..files.staging import check_output
from ..types import Progress
from . import defaults
from .adapter import NAME, check_of_training_alone, continued_adapter, new_adapter
from .held_out import with_rows_to_score
from .interrupt import asked_to_stop
from .optimizer import parameter_groups
from .plan import make_plan
from .precision import Precision, cast_frozen_linears, widen
from .processes import Processes, join
from .report import TrainReport
from .run import Run
from .settings import TrainSettings
from .state import FILE, folder_of, load_state
from .step import PEAK, Learner
from .task import TrainingTask

METRICS = "metrics.json"
BETAS = (0.9, 0.999)


def train_adapter(
    task: TrainingTask,
    out: str | os.PathLike[str],
    settings: TrainSettings | None = None,
    *,
    bundle: Bundle | None = None,
    resume: bool = False,
    force: bool = False,
    shard_base: bool = False,
    allow_base_mismatch: bool = False,
    metrics: str | os.PathLike[str] | None = None,
    picture: bool = True,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Train an adapter; write it as a bundle, the best by the metric so far, whenever it improves.

    Beside the bundle, `OUT.train/` holds the state to resume from, `metrics.json` and `curve.png`.
    Every file is the old one or the new one, whenever the process dies.

    Args:
        task: the model and its rows. The model is changed: it keeps the adapter "default", as the
            bundle has it, unless the run ends early; a dtype other than float32 casts its frozen
            linear layers.
        out: the bundle, *.fourierft.safetensors by custom.
        settings: how; by default the rules of `train.defaults`.
        bundle: train this adapter further rather than a new one.
        resume: go on with the run whose state lies beside `out`; on the CPU the result is, bit for
            bit, that of a run that was never stopped.
        force: replace `out` and its folder.
        shard_base: spread the base over the processes (torchrun).
        allow_base_mismatch: accept a `bundle` that was trained on other base weights.
        metrics: where to write the report as JSON; by default in the folder.
        picture: draw the learning curve, where matplotlib is installed.
        processes: those that train together; by default the ones that torchrun's environment names.
        progress: called with (what, done, total).

    Returns:
        Scores before and after, sizes, times, curves.

    Raises:
        UsageError: settings that do not fit the model or each other; `out` exists without
            `force`; a loss that is not finite (the bundle stays as it was).
        BaseMismatchError: `bundle` does not belong to the model.
        BadInputError, FileAccessError: the state to resume from, or the outputs.
        TrainingInterrupted: Ctrl-C; a `KeyboardInterrupt` that says what was kept.
    """
    settings = settings or TrainSettings()
    if bundle is not None:
        check_of_training_alone(settings)
    settings = resolved(settings)
    check_outputs(out, metrics, resume=resume, force=force)
    owned = processes is None
    check_new_name(task.model, NAME)
    processes = processes or join(settings.device)
    try:
        with ExitStack() as stack:
            stack.enter_context(_taken_off_after_failure(task.model))
            stack.enter_context(_own_randomness(processes.device))
            stack.enter_context(_threads(settings.threads))
            stopped = stack.enter_context(asked_to_stop())
            run = _begin(
                task,
                settings,
                processes,
                Path(out),
                Path(metrics or folder_of(out) / METRICS),
                picture,
                bundle=bundle,
                shard_base=shard_base,
                allow_base_mismatch=allow_base_mismatch,
            )
            processes.barrier()  # all have looked at the outputs before anyone writes
            if resume:
                run.take_up()
            return run.go(progress or _silent, stopped)
    finally:
        if owned:
            processes.close()


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


def check_outputs(
    out: str | os.PathLike[str],
    metrics: str | os.PathLike[str] | None = None,
    *,
    resume: bool,
    force: bool,
    inputs: tuple[str | os.PathLike[str], ...] = (),
) -> None:
    """Refuse outputs that exist, before anything slow begins.

    Args:
        out: the bundle.
        metrics: the report, if it does not go into the bundle's folder.
        resume: go on with what is there.
        force: replace what is there.
        inputs: files and folders that are read.

    Raises:
        UsageError: the bundle, its folder or the metrics exist, with neither `resume` nor `force`;
            both are asked for; one of them is an input, or the bundle and the metrics are one.
        FileAccessError: a folder to write to is missing, or a file where a folder belongs or the
            other way round; no state to resume from.
    """
    if resume and force:
        raise UsageError(
            "resume, force", expected="one of them", found="both", remedy="leave one out"
        )
    check_output(out, force=force or resume, inputs=inputs)
    folder = folder_of(out)
    empty = folder.is_dir() and not any(folder.iterdir())  # of a run that had nothing to keep yet
    check_output(folder, force=force or resume or empty, inputs=inputs)
    if metrics is not None:
        check_output(metrics, force=force or resume, inputs=(*inputs, out, folder / FILE))
    files = [path for path in (out, metrics) if path is not None and os.path.isdir(path)]
    if files or (folder.exists() and not folder.is_dir()):
        raise FileAccessError(
            (files or [folder])[0],
            expected="a file to write" if files else "a folder to write to",
            found="a folder" if files else "a file",
            remedy="choose another output",
        )
    if resume:
        load_state(folder / FILE)


def _begin(
    task: TrainingTask,
    settings: TrainSettings,
    processes: Processes,
    out: Path,
    metrics_file: Path,
    picture: bool,
    *,
    bundle: Bundle | None,
    shard_base: bool,
    allow_base_mismatch: bool,
) -> Run:
    """Everything up to the first step: rows, adapter, optimizer."""
    task, told = with_rows_to_score(task, settings)
    if settings.gradient_checkpointing:
        _save_memory(task.model)
    torch.manual_seed(settings.seed)
    if bundle is None:
        adapter = new_adapter(task, settings)
    else:
        adapter = continued_adapter(task, bundle, allow_base_mismatch=allow_base_mismatch)
    precision = Precision(settings.dtype, processes.device)
    if precision.is_mixed:
        widen(adapter.learning().values())
        cast_frozen_linears(task.model, precision.dtype)
    processes.wrap(task.model, shard_base=shard_base)
    plan = make_plan(task, settings)
    groups = parameter_groups(
        task.model,
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        weight_decay=settings.weight_decay,
        spectrum_weight_decay=settings.spectrum_weight_decay,
        same_rate=settings.layer_rates == "same",
        steps=plan.steps,
    )
    for group in groups:
        group[PEAK] = group["lr"]
    learning = adapter.learning()
    # One kernel per group instead of a dozen per tensor, where there is such a kernel.
    fused = {parameter.device.type for parameter in learning.values()} <= {"cpu", "cuda"}
    learner = Learner(
        model=task.model,
        task=task,
        optimizer=torch.optim.AdamW(groups, betas=BETAS, fused=fused),
        learning=learning,
        processes=processes,
        precision=precision,
        accumulate=settings.accumulate,
        max_grad_norm=settings.max_grad_norm or 0.0,
        seed=settings.seed,
        dropout=settings.dropout,
    )
    return Run(
        task, settings, adapter, learner, plan, out, metrics_file, picture, (*task.notes, *told)
    )


def _save_memory(model: torch.nn.Module) -> None:
    """Turn on gradient checkpointing.

    Raises:
        UsageError: the model does not offer it.
    """
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise UsageError(
            "gradient_checkpointing",
            expected="a model with gradient_checkpointing_enable(), as those of transformers",
            found=type(model).__name__,
            remedy="leave the option out; --accumulate saves memory with any model",
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def _taken_off_after_failure(model: torch.nn.Module) -> Iterator[None]:
    """Take the adapter off again if the run ends early, so that the model can go on with it."""
    try:
        yield
    except BaseException:
        if NAME in adapter_names(model):
            detach(model, NAME)
        raise


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""
