"""From data files to a `TrainingTask`: one entry for every task."""

from __future__ import annotations

import os
from dataclasses import replace

from ...errors import FileAccessError, UsageError
from ..task import TrainingTask
from .causal import causal_lm
from .images import image_classification
from .module import call_factory, plain_classification
from .split import SplitSettings
from .text import TextSettings, text_classification
from .words import token_classification

TASKS = ("text-classification", "token-classification", "image-classification", "causal-lm")

Path = str | os.PathLike[str]


def prepare(
    task: str | None,
    *,
    model: Path | None = None,
    module: str | None = None,
    data: Path | None = None,
    eval_data: Path | None = None,
    text_columns: tuple[str, ...] = (),
    label_column: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    max_rows: int | None = None,
    eval_share: float = 0.1,
    seed: int = 0,
    dtype: str | None = "float32",
) -> TrainingTask:
    """What to train, from a model and data files.

    Args:
        task: one of `TASKS`.
        model: a Hugging Face model directory.
        module: "package.module:factory", which makes the model or the whole task; a model of text
            needs `model` too, for its tokenizer, and keeps the dtype that it was made in.
        data: rows to learn from.
        eval_data: rows to score; None holds out a share of `data`.
        text_columns: one or two columns of text; () for the usual names.
        label_column: column of labels; None for the usual names.
        max_length: tokens per row; None for a usual number that the model can take.
        pack: causal-lm: fill rows with several texts.
        max_rows: use at most so many training rows, drawn by `seed`.
        eval_share: what share of the training rows to hold out (at most 1,000 rows); 0 for none.
        seed: of new heads and of what is drawn.
        dtype: name of a torch dtype to load the model in; None keeps the checkpoint's.

    Raises:
        UsageError: options that are missing, clash or are out of range.
        BadInputError: bad rows, all listed; models and tokenizers that cannot be loaded.
        BaseMismatchError: a model that lacks more than its head.
        FileAccessError: files that are missing or unreadable.
        MissingExtraError: a package that the task needs is not installed.
    """
    rows = SplitSettings(max_rows, eval_share, seed)
    text = TextSettings(text_columns, label_column, max_length, pack)
    if task is not None and task not in TASKS:
        raise UsageError("task", expected=" or ".join(TASKS), found=repr(task))
    own = None if module is None else call_factory(module)
    if isinstance(own, TrainingTask):
        given = {
            "--model": model,
            "--task": task,
            "--data": data,
            "--eval": eval_data,
            "--text-column": text_columns,
            "--label-column": label_column,
            "--max-length": max_length,
            "--max-train-rows": max_rows,
            "--pack": pack,
        }
        unused = ", ".join(name for name, value in given.items() if value)
        told = f"not used, since the module brings a whole task: {unused}"
        return replace(own, notes=(*own.notes, told)) if unused else own
    most = 2 if task == "text-classification" else 1
    if len(text_columns) > most:
        raise UsageError(
            "text_column", expected=f"at most {most}", found=", ".join(map(repr, text_columns))
        )
    if data is None:
        raise UsageError("data", expected="rows to learn from", found="none", remedy="give --data")
    if model is not None and not os.path.isdir(model):
        found = "a file" if os.path.exists(model) else "nothing there"
        raise FileAccessError(model, expected="a model's directory", found=found)
    if own is not None and task in (None, "image-classification"):
        return plain_classification(own, data, eval_data, settings=text, rows=rows)
    if task is None:
        raise UsageError("task", expected=" or ".join(TASKS), found="none", remedy="give --task")
    if task == "causal-lm" and (model is not None or own is not None):
        return causal_lm(model, data, eval_data, settings=text, rows=rows, dtype=dtype, model=own)
    if model is None:
        what = "a directory with the module's tokenizer" if module else "a model to train"
        raise UsageError("model", expected=what, found="none", remedy="give --model")
    if task == "image-classification":
        return image_classification(model, data, eval_data, settings=text, rows=rows, dtype=dtype)
    make = text_classification if task == "text-classification" else token_classification
    return make(model, data, eval_data, settings=text, rows=rows, dtype=dtype, model=own)
