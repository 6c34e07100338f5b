"""From settings to a `TrainingTask`: one entry for every task and for factories of modules."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...errors import FourierFTError, UsageError
from ...models.task import ALIASES
from ..settings import DataSettings, TrainSettings
from ..task import TrainingTask
from . import tasks
from .models import find_model
from .rows import load_rows
from .tasks import Source

# What makes a task, and the options that it does not use.
TASKS: dict[str, tuple[Callable[[Source], TrainingTask], tuple[str, ...]]] = {
    "text-classification": (tasks.text_classification, ("pack",)),
    "token-classification": (tasks.token_classification, ("pack", "problem_type")),
    "image-classification": (tasks.image_classification, ("pack", "problem_type", "max_length")),
    "text-generation": (tasks.text_generation, ("problem_type", "label_column")),
}
UNUSED_BY_MODULES = (
    *("model", "task", "data", "eval", "text_column", "label_column"),
    *("problem_type", "pack", "max_length", "max_train_rows"),
)


def prepare(data: DataSettings, settings: TrainSettings) -> TrainingTask:
    """The model to train and its rows; bad rows and options without use here are errors."""
    name = ALIASES.get(data.task or "", data.task or "none")
    make, unused = TASKS.get(name, (None, UNUSED_BY_MODULES))
    if make is None and data.module is None:
        raise UsageError("task", expected=" or ".join(TASKS), found=name, remedy="give --task")
    for option, what in (("model", "a model to train"), ("data", "rows to learn from")):
        if getattr(data, option) is None and data.module is None:
            raise UsageError(option, expected=what, found="none", remedy=f"give --{option}")
    given, unused = vars(data) | vars(settings), UNUSED_BY_MODULES if data.module else unused
    wrong = ", ".join(f"--{name.replace('_', '-')}" for name in unused if given[name])
    if wrong:
        by = "--module, which brings a whole task," if data.module else f"--task {name}"
        raise UsageError(wrong, expected=f"options that {by} uses", remedy="leave it out")
    if data.module is not None or make is None:
        return call_factory(data.module or "")
    columns = data.text_column or ()
    most = 2 if name == "text-classification" else 1
    if len(columns) > most:
        found = ", ".join(map(repr, columns))
        raise UsageError("text_column", expected=f"at most {most}", found=found)
    directory, images = find_model(str(data.model)), name == "image-classification"
    sets = [load_rows(str(data.data), images=images)]
    if data.eval:
        sets.append(load_rows(data.eval, split="eval", images=images))
    return make(Source(name, sets, directory, data, settings))


def call_factory(spec: str) -> TrainingTask:
    """Import "package.module:factory" and call the factory without arguments."""
    path, colon, name = spec.partition(":")
    if not (path and colon and name):
        raise UsageError(
            "module", expected="package.module:factory", found=repr(spec), remedy="name both"
        )
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    # What a user's own code raises may be anything; its traceback stays with the cause.
    try:
        importlib.invalidate_caches()
        factory: Any = importlib.import_module(path)
        for part in name.split("."):
            factory = getattr(factory, part)
        made = factory() if callable(factory) else factory
        task = TrainingTask(**made) if isinstance(made, Mapping) else made
    except FourierFTError:
        raise
    except Exception as error:
        raise UsageError(
            f"module {spec}",
            expected="a factory that can be imported and called without arguments",
            found=f"{type(error).__name__}: {error}",
            remedy="correct it (--debug shows where it failed)",
        ) from error
    if not isinstance(task, TrainingTask) or not isinstance(task.model, nn.Module):
        raise UsageError(
            f"module {spec}",
            expected="a factory that returns a TrainingTask, or a mapping with model and "
            "train_dataset",
            found=type(task).__name__,
            remedy="see samples/training/digits_task.py",
        )
    return task
