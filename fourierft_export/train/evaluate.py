"""Scores of a model on rows, by one process or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .order import share
from .precision import Precision
from .processes import Processes
from .task import TrainingTask

LOSS = "loss"
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "error", "mae", "mse", "rmse"})


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors within mappings, lists and tuples on another device; the rest as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(inner, device) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_device(inner, device) for inner in value)
    return value


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: TrainingTask,
    rows: Sequence[Any],
    *,
    batch_size: int,
    processes: Processes,
    precision: Precision,
) -> dict[str, float]:
    """The task's metrics and the mean loss over `rows`; every process gets the same.

    Args:
        model: left in eval mode.
        batch_size: rows at a time, over all processes.
    """
    model.eval()
    loss = torch.zeros(2, dtype=torch.float64)
    sums: dict[str, Tensor] = {}
    for first in range(0, len(rows), batch_size):
        numbers = range(first, min(first + batch_size, len(rows)))
        (mine,) = share(numbers, processes.rank, processes.world, 1)
        # A process without rows takes part all the same: a sharded base needs everybody.
        taken = mine or list(numbers[:1])
        batch = to_device(task.collate([rows[i] for i in taken]), processes.device)
        with precision.autocast():
            found = task.step(model, batch)
        if mine:
            loss += torch.tensor([found.loss.item(), found.count], dtype=torch.float64)
        for name, value in found.sums.items():
            value = value.detach().cpu()
            value = value if mine else torch.zeros_like(value)
            sums[name] = sums[name] + value if name in sums else value
    total, count = processes.sum(loss).tolist()
    metrics = task.metrics({name: processes.sum(value) for name, value in sums.items()})
    return {LOSS: total / max(count, 1.0)} | {name: float(v) for name, v in metrics.items()}


def check_metric(metric: str, found: Mapping[str, float]) -> None:
    """Raise UsageError unless the task has such a metric."""
    if metric not in found:
        raise UsageError("metric", expected="one of " + ", ".join(found), found=metric)


def is_better(new: float, old: float, *, higher: bool) -> bool:
    """Whether a score beats another; NaN beats nothing, and everything beats NaN."""
    if old != old:
        return new == new
    return new > old if higher else new < old
