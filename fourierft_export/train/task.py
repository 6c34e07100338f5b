"""What is trained: a model, its rows, and how a batch becomes a loss and a score.

All that the training loop needs to know of a task. Losses and scores are sums that add up over
batches and processes; they are divided once, at the end, so that one process and many agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Any]
Sums = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """One batch through the model.

    Attributes:
        loss: scalar, the sum (not the mean) over the items that count; its gradient is taken.
        count: how many items were summed: rows, or tokens.
        sums: name -> detached tensor, whatever `TrainingTask.metrics` needs; tensors of one name
            have one shape and add up over batches and processes (numbers correct, a confusion
            matrix, ...).
    """

    loss: Tensor
    count: int
    sums: Sums


@dataclass(frozen=True)
class TrainingTask:
    """A model and what to train it on.

    Attributes:
        model: the base with its task head, on the CPU, without adapters.
        train: rows to learn from; only their number and `train[i]` are used.
        eval: rows to score, or None.
        collate: some rows -> a batch, tensors on the CPU.
        step: (model, batch on the model's device) -> `StepResult`; used for learning and scoring.
        metrics: sums over all scored rows -> name -> value; the mean loss is added by the loop
            under the name "loss".
        metric: the metric that says which adapter is best.
        higher_is_better: whether more of it is better.
        task_type: PEFT's task type ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM") or None.
        modules_to_save: heads to train and save whole, by the end of their path.
        target_modules: the layers to adapt, unless the user says otherwise; None for the
            architecture's usual ones.
        lengths: items in each training row, if rows of like length should meet in a batch; else
            None.
        notes: what a user should know of how the rows and the model were made.
        labels: names of the classes by id, where there are classes.
    """

    model: nn.Module
    train: Sequence[Any]
    eval: Sequence[Any] | None
    collate: Callable[[Sequence[Any]], Batch]
    step: Callable[[nn.Module, Batch], StepResult]
    metrics: Callable[[Sums], dict[str, float]]
    metric: str = "loss"
    higher_is_better: bool = False
    task_type: str | None = None
    modules_to_save: tuple[str, ...] = ()
    target_modules: str | tuple[str, ...] | None = None
    lengths: Sequence[int] | None = None
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
