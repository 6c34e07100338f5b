"""What is trained: a model and its rows, in the words of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from .settings import TrainSettings

MAX_HELD_OUT = 1000


@dataclass(frozen=True)
class TrainingTask:
    """A model and the rows to train it on.

    The first nine fields are `transformers.Trainer`'s own arguments.

    Attributes:
        model: the base with its task head, on the CPU, without adapters. Without a
            `compute_loss_func` it returns its loss, as a mapping's "loss" or as the first element.
        train_dataset: rows to learn from, with a length.
        eval_dataset: rows to score, or None.
        data_collator: some rows -> a batch, a mapping of tensors; "labels" holds the labels.
        compute_loss_func: (outputs, labels, num_items_in_batch=...) -> the loss: the sum over this
            part of a batch divided by that number, so that parts and processes add up.
        compute_metrics: `EvalPrediction` -> name -> value.
        preprocess_logits_for_metrics: (logits, labels) -> what is kept for `compute_metrics`.
        metric_for_best_model: the metric that says which adapter is best.
        greater_is_better: whether more of it is better; None decides by its name.
        task_type: PEFT's task type ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM") or None.
        modules_to_save: heads to train and save whole, by the end of their path.
        target_modules: the layers to adapt, unless the user says otherwise; None for the
            architecture's usual ones.
        lengths: of the training rows, if rows of like length should meet in a batch; else None.
        notes: what a user should know of how the rows and the model were made.
        labels: names of the classes by id, where there are classes.
    """

    model: nn.Module
    train_dataset: Sequence[Any]
    eval_dataset: Sequence[Any] | None = None
    data_collator: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None
    compute_loss_func: Callable[..., Any] | None = None
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None
    metric_for_best_model: str = "loss"
    greater_is_better: bool | None = None
    task_type: str | None = None
    modules_to_save: tuple[str, ...] = ()
    target_modules: str | tuple[str, ...] | None = None
    lengths: Sequence[int] | None = None
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def hold_out(
    count: int, settings: TrainSettings, scored: bool
) -> tuple[list[int], list[int], tuple[str, ...]]:
    """The numbers of the rows to learn from and to score, each in the file's order, and notes.

    Args:
        count: of the training rows.
        settings: its seed draws the rows.
        scored: there are other rows to score, so that none is held out.
    """
    order = np.random.default_rng(settings.seed).permutation(count)
    held, notes = 0, []
    if not scored and settings.eval_share and count > 1:
        held = min(max(round(count * settings.eval_share), 1), MAX_HELD_OUT, count - 1)
        notes.append(f"no rows to score were given: {held} of {count} training rows are held out")
    kept = order[held:][: settings.max_train_rows]
    if len(kept) < count - held:
        notes.append(f"{len(kept)} of {count - held} training rows are used")
    return np.sort(kept).tolist(), np.sort(order[:held]).tolist(), tuple(notes)
