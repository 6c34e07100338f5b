"""`train_adapter`: rows and a model to a bundle that always holds the best adapter so far."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments

from ..adapt.attach import attach, detach
from ..adapt.inject import inject
from ..adapt.modules import adapter_names, check_new_name
from ..bundle.peft import BundleSource
from ..errors import FileAccessError, FourierFTError, UsageError, first_line
from ..files.staging import check_output
from ..types import Progress
from . import defaults
from .checkpoint import FACTS, folder_of, last_checkpoint
from .live_adapter import NAME, LiveAdapter, choose_config
from .report import TrainReport
from .settings import OF_ADAPTER, TrainSettings
from .task import TrainingTask, hold_out
from .trainer import cast_frozen_linears
from .training_run import Run


def train_adapter(
    task: TrainingTask,
    out: str | os.PathLike[str],
    settings: TrainSettings | None = None,
    *,
    bundle: BundleSource | None = None,
    resume: bool = False,
    force: bool = False,
    allow_base_mismatch: bool = False,
    picture: bool = True,
    progress: Progress | None = None,
) -> TrainReport:
    """Trains an adapter with transformers' Trainer and writes the best one so far as a bundle.

    `OUT.train/` holds the Trainer's last checkpoint, from which `resume` goes
    on, `metrics.json` and `curve.png`. The bundle is the old file or the new one, whenever the
    process dies. Under `torchrun` or `accelerate launch` all processes train together.

    Args:
        task: the model and its rows. The model is changed: it keeps the adapter "default", as the
            bundle has it, unless the run ends early; a dtype other than float32 casts its frozen
            linear layers.
        out: the bundle, *.fourierft.safetensors by custom.
        settings: how to train; by default the rules of `train.defaults`.
        bundle: train this adapter (or the one at this path) further, rather than a new one.
        resume: continue the run whose checkpoint is in `OUT.train/`; in one process on the CPU
            the result is, bit for bit, that of a run that was never stopped.
        force: replace `out` and its folder.
        allow_base_mismatch: accept a `bundle` that was trained on other base weights.
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
    settings = resolved(settings)
    if bundle is not None:
        check_settings_of_training(settings)
    check_outputs(out, resume=resume, force=force, inputs=(bundle,))
    check_new_name(task.model, NAME)
    if not len(task.train_dataset):
        raise UsageError("training rows", expected="at least one", found="none")
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, folder_of(out))
        stack.enter_context(_restored(task.model, settings.threads))
        arguments = make_arguments(settings, folder_of(out))
        stack.enter_context(_processes(arguments))
        interrupted = stack.enter_context(_ctrl_c_noted())
        task, note = with_rows_to_score(task, settings)
        run = Run(
            task=task,
            settings=settings,
            adapter=put_adapter(task, settings, bundle, allow_base_mismatch),
            arguments=arguments,
            out=Path(out),
            picture=picture,
            notes=(*task.notes, *note),
            progress=progress if arguments.process_index == 0 else None,
            interrupted=interrupted,
        )
        return run.train(resume)


def resolved(settings: TrainSettings) -> TrainSettings:
    """The settings with every default that needs no model worked out."""
    epochs = None if settings.steps else settings.epochs or defaults.EPOCHS
    batch_size = settings.batch_size or max(defaults.BATCH_SIZE, settings.accumulate)
    return replace(settings, epochs=epochs, batch_size=batch_size)


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
            found=first_line(error),
            remedy="use --device cpu",
        ) from error
    if settings.dtype == "float16" and kind == "cpu":
        raise UsageError("dtype float16", expected="a GPU", found="cpu", remedy="use bfloat16")
    if kind.startswith("cuda:"):
        torch.cuda.set_device(kind)
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=kind == "cpu",
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        seed=settings.seed,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.accumulate,
        save_total_limit=1,
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to or ()),
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_broadcast_buffers=False,
        log_level="error",
    )


def put_adapter(
    task: TrainingTask,
    settings: TrainSettings,
    bundle: BundleSource | None,
    allow_base_mismatch: bool,
) -> LiveAdapter:
    """Put the adapter that learns on the task's model, everything else ready for it."""
    model: Any = task.model
    if settings.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
            raise UsageError(
                "gradient_checkpointing",
                expected="a model with gradient_checkpointing_enable(), as those of transformers",
                found=type(model).__name__,
                remedy="leave the option out; --accumulate saves memory with any model",
            )
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(settings.seed)
    if bundle is None:
        inject(model, choose_config(task, settings)[0], NAME)
    else:
        attach(model, bundle, NAME, trainable=True, allow_base_mismatch=allow_base_mismatch)
    adapter = LiveAdapter.of(model)
    if settings.dtype != "float32":
        for parameter in adapter.learning():  # in half precision small steps would be lost
            parameter.data = parameter.data.float()
        cast_frozen_linears(model, getattr(torch, settings.dtype))
    return adapter


def check_settings_of_training(settings: TrainSettings) -> None:
    """Refuse settings of a new adapter, where a bundle says what the adapter is."""
    plain = TrainSettings()
    clash = [name for name in OF_ADAPTER if getattr(settings, name) != getattr(plain, name)]
    if clash:
        raise UsageError(
            ", ".join(clash),
            expected="settings of the training alone, since the bundle says what the adapter is",
            found=f"{len(clash)} of the adapter",
            remedy="leave them out, or train without the bundle",
        )


def with_rows_to_score(
    task: TrainingTask, settings: TrainSettings
) -> tuple[TrainingTask, tuple[str, ...]]:
    """The task; of its training rows some are held out if it has none to score."""
    rows: Any = task.train_dataset
    whole = replace(settings, max_train_rows=None)  # which counts rows of files
    learnt, held, notes = hold_out(len(rows), whole, bool(task.eval_dataset))
    subset: Any = torch.utils.data.Subset
    if len(learnt) < len(rows):
        lengths = task.lengths and [task.lengths[i] for i in learnt]
        task = replace(task, train_dataset=subset(rows, learnt), lengths=lengths)
    scored = task.eval_dataset or (subset(rows, held) if held else None)
    unused = [name for name in ("patience", "metric") if getattr(settings, name) is not None]
    if scored is None and unused:
        raise UsageError(
            ", ".join(unused),
            expected="rows to score",
            found="none",
            remedy="give some (--eval or --eval-share), or leave this out",
        )
    return replace(task, eval_dataset=scored), notes


def check_outputs(
    out: str | os.PathLike[str],
    *,
    resume: bool,
    force: bool,
    inputs: tuple[object, ...] = (),
) -> None:
    """Refuse outputs that exist, or that are `inputs` too, before anything slow begins."""
    if resume and force:
        raise UsageError(
            "resume, force", expected="one of them", found="both", remedy="leave one out"
        )
    folder = folder_of(out)
    # A run that was stopped before its first checkpoint left nothing worth keeping.
    empty = folder.is_dir() and {path.name for path in folder.iterdir()} <= {FACTS}
    check_output(out, force=force or resume, inputs=inputs)
    check_output(folder, force=force or resume or empty, inputs=inputs)
    remedy = "choose another output"
    if os.path.isdir(out):
        raise FileAccessError(out, expected="a file to write", found="a folder", remedy=remedy)
    if folder.exists() and not folder.is_dir():
        raise FileAccessError(folder, expected="a folder", found="a file", remedy=remedy)
    if resume:
        last_checkpoint(out)


def _remove_if_empty(folder: Path) -> None:
    """A run that failed before its first step leaves nothing."""
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _restored(model: nn.Module, threads: int | None) -> Iterator[None]:
    """Leave global generators and threads as they were; a failed run takes its adapter off."""
    before = random.getstate(), np.random.get_state(), torch.get_num_threads()
    torch.set_num_threads(threads or before[2])
    try:
        with torch.random.fork_rng():
            yield
    except BaseException:
        if NAME in adapter_names(model):
            detach(model, NAME)
        raise
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_num_threads(before[2])


@contextmanager
def _processes(arguments: TrainingArguments) -> Iterator[None]:
    """Join the processes that a launcher started, and leave them at the end."""
    owned = not _is_distributed()
    arguments.device  # noqa: B018 - joins them
    arguments._n_gpu = min(1, arguments._n_gpu)  # one process uses one GPU
    try:
        yield
    except RuntimeError as error:
        if arguments.world_size == 1:
            raise
        raise FourierFTError(
            f"process {arguments.process_index} of {arguments.world_size}",
            expected="all processes to run to the end",
            found=first_line(error),
            remedy="see the other processes' errors, then use --resume; the last bundle is intact",
        ) from error
    finally:
        if owned and _is_distributed():
            # First the Trainer lets go of the group: freed last, by Python's collector, it can wait
            # for a thread of its own that waits for Python.
            gc.collect()
            torch.distributed.destroy_process_group()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True after Ctrl-C; a second Ctrl-C stops at once."""
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True

    in_main = threading.current_thread() is threading.main_thread()
    # Somebody else may decide what Ctrl-C does.
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
