"""Models of the user's own: "package.module:factory" makes a model, or the whole task.

A plain model gets rows of numbers: arrays `inputs` and `labels` of an npz file, or lists of that
name in jsonl or parquet. It is called with one float tensor and returns logits.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import BadInputError, FourierFTError, UsageError
from ..task import Batch, StepResult, TrainingTask
from .labels import label_ids, make_labels, read_labels
from .loading import usual_targets
from .losses import logits_of, score_classes, summed
from .probe import count_classes
from .rows import read_table
from .scores import class_counts
from .split import SplitSettings, split
from .table import Complaints, Table, brief, first_present
from .text import TextSettings, label_column

INPUTS = (("inputs",), ("images",), ("pixel_values",))
Row = tuple[np.ndarray[Any, Any], int]


def call_factory(spec: str) -> nn.Module | TrainingTask:
    """Import "package.module:factory" and call the factory without arguments.

    Modules of the working directory are found, as with `python -m`.

    Raises:
        UsageError: it cannot be imported, is not there, raises, or returns something else.
    """
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
        factory = importlib.import_module(path)
        for part in name.split("."):
            factory = getattr(factory, part)
        made = factory() if callable(factory) else factory
    except FourierFTError:
        raise
    except Exception as error:
        raise UsageError(
            f"module {spec}",
            expected="a factory that can be imported and called without arguments",
            found=f"{type(error).__name__}: {error}",
            remedy="correct it (--debug shows where it failed)",
        ) from error
    if not isinstance(made, nn.Module | TrainingTask):
        raise UsageError(
            f"module {spec}",
            expected="a factory that returns a torch.nn.Module or a TrainingTask",
            found=type(made).__name__,
        )
    return made


def plain_classification(
    model: nn.Module,
    data: str | os.PathLike[str],
    eval_data: str | os.PathLike[str] | None,
    *,
    settings: TextSettings,
    rows: SplitSettings,
) -> TrainingTask:
    """A model of one label per row of numbers.

    Args:
        model: one float tensor (rows, ...) to logits (rows, classes), or an object that has them.
        data, eval_data: files with `inputs` (or `images`) and `labels`; uint8 is scaled to 0..1,
            other numbers stay as they are.
        settings: columns; text_columns names the one of the inputs.
        rows: which rows are used and held out.

    Raises:
        BadInputError: bad rows, all listed.
        UsageError: columns that are not there; a model that does not take the rows, or has too few
            classes.
    """
    table, inputs = _read(data, settings)
    found = _labels(table, settings)
    labels = make_labels(table, found)
    scored: list[Row] | None = None
    if eval_data is not None:
        other, other_inputs = _read(eval_data, settings)
        if other_inputs.shape[1:] != inputs.shape[1:]:
            raise BadInputError(
                other.path,
                expected=f"inputs of shape {list(inputs.shape[1:])}",
                found=f"{list(other_inputs.shape[1:])}",
            )
        if (other_inputs.dtype == np.uint8) != (inputs.dtype == np.uint8):
            raise BadInputError(
                other.path,
                expected=f"inputs of {inputs.dtype}, as in {table.path}",
                found=f"{other_inputs.dtype}",
                remedy="store both in one way: bytes are scaled to 0..1, other numbers are not",
            )
        ids = label_ids(other, _labels(other, settings), other.places, labels)
        scored = list(zip(other_inputs, ids, strict=True))
    ids = label_ids(table, found, table.places, labels)
    learnt, scored, notes = split(list(zip(inputs, ids, strict=True)), scored, rows)
    if inputs.dtype == np.uint8:
        notes += ("inputs are bytes: they are scaled to 0..1",)
    example = collate(learnt[:1])["inputs"]
    what = f"a float tensor of shape {list(example.shape)}"
    classes = count_classes(model, len(labels), what, example.to(_dtype(model)))
    names = (*labels.names, *map(str, range(len(labels), classes)))
    return TrainingTask(
        model=model,
        train=learnt,
        eval=scored,
        collate=collate,
        step=classify_inputs,
        metrics=score_classes,
        metric="accuracy",
        higher_is_better=True,
        target_modules=usual_targets(model),
        notes=notes,
        labels=names,
    )


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Float32 "inputs" (rows, ...), bytes scaled to 0..1, and int64 "labels" (rows,)."""
    inputs = np.stack([values for values, _ in rows])
    scale = np.float32(255) if inputs.dtype == np.uint8 else np.float32(1)
    return {
        "inputs": torch.from_numpy(inputs.astype(np.float32) / scale),
        "labels": torch.tensor([label for _, label in rows]),
    }


def classify_inputs(model: nn.Module, batch: Batch) -> StepResult:
    """One label per row: logits (rows, classes), labels (rows,)."""
    labels = batch["labels"]
    logits = logits_of(model(batch["inputs"].to(_dtype(model))))
    return StepResult(summed(logits, labels), len(labels), class_counts(logits, labels))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _labels(table: Table, settings: TextSettings) -> list[str | int]:
    name = label_column(table, settings.label_column)
    return read_labels(table, table.column(name, "--label-column"))


def _read(
    path: str | os.PathLike[str], settings: TextSettings
) -> tuple[Table, np.ndarray[Any, Any]]:
    """A table, and its inputs as one array (rows, ...).

    Raises:
        BadInputError: rows that are not finite numbers of one shape; all are listed.
    """
    table = read_table(path)
    asked = settings.text_columns
    name = first_present(table, [asked] if asked else INPUTS, "inputs", "--text-column")[0]
    column = table.columns[name]
    complaints = Complaints(table.path, "finite numbers of one shape in every row")
    arrays = [_numbers(value) for value in column]
    shape = next((a.shape for a in arrays if a is not None), ())
    for place, value, array in zip(table.places, column, arrays, strict=True):
        if array is None:
            complaints.add(place, f"{name} {brief(value)}")
        elif array.shape != shape:
            complaints.add(place, f"{name} of shape {list(array.shape)}, others have {list(shape)}")
        elif not np.isfinite(array).all():
            complaints.add(place, f"{name} with values that are not finite")
    complaints.check()
    return table, np.stack([array for array in arrays if array is not None])


def _numbers(value: Any) -> np.ndarray[Any, Any] | None:
    """A row's numbers: uint8 as it is, others as float32; None if they are not numbers."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        return None
    if array.dtype == np.uint8:
        return array
    return array.astype(np.float32) if array.dtype.kind in "iuf" else None
