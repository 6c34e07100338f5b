"""From data files to a `TrainingTask`: one entry for every task."""

from __future__ import annotations

import os

from ..errors import FileAccessError, UsageError
from .causal import causal_lm
from .split import SplitSettings
from .task import TrainingTask
from .text import TextSettings, text_classification

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
        module: "package.module:factory", a callable that makes the model or the whole task.
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
    if task not in TASKS:
        raise UsageError("task", expected=" or ".join(TASKS), found=repr(task))
    if model is None:
        raise UsageError("model", expected="a model to train", found="none", remedy="give --model")
    if data is None:
        raise UsageError("data", expected="rows to learn from", found="none", remedy="give --data")
    if not os.path.isdir(model):
        raise FileAccessError(model, expected="a model's directory", found="none")
    if task == "text-classification":
        return text_classification(model, data, eval_data, settings=text, rows=rows, dtype=dtype)
    return causal_lm(model, data, eval_data, settings=text, rows=rows, dtype=dtype)
