"""One step: a batch, over all processes and its parts, to one update of the adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from ..adapt.modules import base_modules, original
from ..errors import UsageError
from .evaluate import to_device
from .order import mixed_seed, share
from .precision import Precision
from .processes import Processes
from .task import TrainingTask

PEAK = "peak"  # key of an optimizer's group: its rate before the schedule


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        loss: mean over the items of the whole batch.
        norm: length of the gradient, before it was shortened.
        seconds: it took.
        stop: whether any process was asked to stop.
    """

    loss: float
    norm: float
    seconds: float
    stop: bool


@dataclass(frozen=True)
class Learner:
    """What every step needs.

    Attributes:
        learning: name -> parameter, in the same order in all processes.
        accumulate: parts that a process takes its share of a batch in.
        max_grad_norm: longer gradients are shortened to it; 0 for never.
        seed: of the run.
        dropout: keep the base's.
    """

    model: nn.Module
    task: TrainingTask
    optimizer: optim.Optimizer
    learning: dict[str, nn.Parameter]
    processes: Processes
    precision: Precision
    accumulate: int
    max_grad_norm: float
    seed: int
    dropout: bool = False

    def step(self, number: int, batch: Sequence[int], *, asked: Callable[[], bool]) -> StepReport:
        """Learn from these rows: the gradient of their mean loss, one update.

        Args:
            number: of the step, from 0.
            batch: numbers of the rows of the whole batch.
            asked: whether this process was asked to stop; all are told.

        Raises:
            UsageError: the loss or its gradient is not finite; the adapter is as it was before.
        """
        began = time.perf_counter()
        parameters = list(self.learning.values())
        # Dropout is a function of the step, so that a resumed run draws the same.
        torch.manual_seed(mixed_seed(self.seed, number, self.processes.rank, 0xD0))
        set_training(self.model, dropout=self.dropout)
        self.optimizer.zero_grad(set_to_none=True)
        loss, count = self._backward(batch)
        self.processes.reduce_gradients(parameters)
        told = torch.tensor([loss, count, float(asked())], dtype=torch.float64)
        total, items, stops = self.processes.sum(told).tolist()
        self.precision.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if items not in (0.0, float(len(batch))):
            torch._foreach_mul_(gradients, len(batch) / items)
        norm = self._shorten(gradients)
        mean = total / max(items, 1.0)
        # float16's scale is found by trial: an infinite gradient there only skips this update.
        if not math.isfinite(mean) or not (
            math.isfinite(norm) or self.precision.scaler.is_enabled()
        ):
            raise _diverged(number, mean, norm)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        return StepReport(mean, norm, time.perf_counter() - began, stops > 0)

    def _backward(self, batch: Sequence[int]) -> tuple[float, int]:
        """Gradients of the summed loss over the rows' number; that sum, and the items in it."""
        processes, task = self.processes, self.task
        losses: list[Tensor] = []
        items = 0
        for rows in share(batch, processes.rank, processes.world, self.accumulate):
            # Without rows it takes part all the same: a sharded base needs everybody.
            taken = [task.train[i] for i in rows or batch[:1]]
            inputs = to_device(task.collate(taken), processes.device)
            with self.precision.autocast():
                found = task.step(self.model, inputs)
            if rows:
                losses.append(found.loss.detach())
                items += found.count
            share_of = found.loss / len(batch) if rows else found.loss * 0.0
            self.precision.scaler.scale(share_of).backward()
        return float(sum(loss.item() for loss in losses)), items

    def _shorten(self, gradients: list[Tensor]) -> float:
        """Shorten the gradient to the largest norm allowed; its norm before."""
        if not gradients:
            return 0.0
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if self.max_grad_norm and math.isfinite(norm) and norm > self.max_grad_norm:
            torch._foreach_mul_(gradients, self.max_grad_norm / norm)
        return norm


def set_training(model: nn.Module, *, dropout: bool) -> None:
    """The mode to learn in.

    Without dropout this is the mode of inference, but for blocks that compute activations twice
    and for recurrent layers, whose backward pass some devices only know in training mode. The
    statistics of normalisation layers stay as they are either way: the bundle does not hold them,
    so that what moved here would be missing where the adapter is used.

    Args:
        model: changed in place.
        dropout: keep the base's.
    """
    model.train(dropout)
    for _, module in base_modules(model):
        inner = original(module)
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            inner.eval()
        elif isinstance(inner, nn.RNNBase) or getattr(inner, "gradient_checkpointing", False):
            inner.training = True


def _diverged(number: int, loss: float, norm: float) -> UsageError:
    what = f"a loss of {loss}" if not math.isfinite(loss) else f"a gradient of length {norm}"
    return UsageError(
        f"step {number + 1}",
        expected="a finite loss and gradient",
        found=what,
        remedy="the bundle and the state are those before; try lower --learning-rate and "
        "--head-learning-rate, a longer --warmup, or --dtype float32, and look at the rows for "
        "values that are not finite",
    )
