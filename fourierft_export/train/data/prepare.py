"""From settings to a `TrainingTask`: one entry for every task and for factories of modules."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ...errors import FourierFTError, UsageError
from ...models.task import ALIASES
from ..settings import DataSettings, TrainSettings
from ..task import TrainingTask
from .generation import text_generation
from .images import image_classification
from .models import find_model
from .rows import Rows, load_rows
from .text import Source, text_classification, token_classification

TASKS = {
    "text-classification": text_classification,
    "token-classification": token_classification,
    "image-classification": image_classification,
    "text-generation": text_generation,
}


def prepare(data: DataSettings, settings: TrainSettings) -> TrainingTask:
    """The model to train and its rows.

    Raises:
        UsageError: options that are missing, clash or are out of range.
        BadInputError: bad rows, all listed; models and tokenizers that cannot be loaded.
        BaseMismatchError: a model that lacks more than its head.
        FileAccessError: files that are missing or unreadable.
        MissingExtraError: a package that the task needs is not installed.
    """
    if data.module is not None:
        return _of_factory(data, settings)
    name = ALIASES.get(data.task or "", data.task)
    if name not in TASKS:
        found = "none" if name is None else repr(name)
        raise UsageError("task", expected=" or ".join(TASKS), found=found, remedy="give --task")
    if data.model is None or data.data is None:
        option, what = ("model", "a model to train") if data.model is None else (
            "data", "rows to learn from"
        )  # fmt: skip
        raise UsageError(option, expected=what, found="none", remedy=f"give --{option}")
    columns = tuple(data.text_column or ())
    most = 2 if name == "text-classification" else 1
    if len(columns) > most:
        found = ", ".join(map(repr, columns))
        raise UsageError("text_column", expected=f"at most {most}", found=found)
    directory = find_model(data.model)

    def load(source: str, split: str) -> Rows:
        images = name == "image-classification" and os.path.isdir(source)
        return load_rows(source, split=split, builder="imagefolder" if images else "")

    train = load(data.data, "train")
    scored = None if data.eval is None else load(data.eval, "eval")
    return TASKS[name](Source(train, scored, directory, data, settings))


def _of_factory(data: DataSettings, settings: TrainSettings) -> TrainingTask:
    """What "package.module:factory" makes, with a note on options that have no use with it."""
    task = call_factory(data.module or "")
    plain = DataSettings(module=data.module)
    clash = [
        f"--{name.replace('_', '-')}"
        for name in ("model", "task", "data", "eval", "text_column", "label_column", "pack")
        if getattr(data, name) != getattr(plain, name)
    ]
    clash += ["--max-length"] if settings.max_length else []
    clash += ["--max-train-rows"] if settings.max_train_rows else []
    if clash:
        note = f"not used, since the module brings a whole task: {', '.join(clash)}"
        task = replace(task, notes=(*task.notes, note))
    return task


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
            remedy="see samples/digits_task.py",
        )
    return task
