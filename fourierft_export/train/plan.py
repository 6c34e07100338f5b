"""How long a run is, and which rows each of its steps learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from . import defaults
from .order import epoch_batches
from .settings import TrainSettings
from .task import TrainingTask


@dataclass(frozen=True, eq=False)  # compared by identity: lengths may be millions
class Plan:
    """The steps of a run.

    Attributes:
        batch_size: rows of a step, over all processes.
        per_epoch: steps of an epoch.
        steps: in all.
        eval_every: steps between two evaluations; the last step has one in any case.
        rows: how many there are to learn from.
        seed: of their order.
        lengths: of the rows, if rows of like length shall meet.
    """

    batch_size: int
    per_epoch: int
    steps: int
    eval_every: int
    rows: int
    seed: int
    lengths: tuple[int, ...] | None

    def batch(self, step: int) -> list[int]:
        """Numbers of the rows of a step (from 0)."""
        epoch, place = divmod(step, self.per_epoch)
        return _batches(self, epoch)[place]


@lru_cache(maxsize=1)
def _batches(plan: Plan, epoch: int) -> list[list[int]]:
    return epoch_batches(
        plan.rows, plan.batch_size, seed=plan.seed, epoch=epoch, lengths=plan.lengths
    )


def make_plan(task: TrainingTask, settings: TrainSettings) -> Plan:
    """The plan by the settings; epochs are rounded to whole steps."""
    batch = settings.batch_size or defaults.BATCH_SIZE
    per_epoch = math.ceil(len(task.train) / batch)
    grouped = settings.group_lengths and task.lengths is not None
    return Plan(
        batch_size=batch,
        per_epoch=per_epoch,
        steps=settings.steps or max(1, round((settings.epochs or 1) * per_epoch)),
        eval_every=settings.eval_every or per_epoch,
        rows=len(task.train),
        seed=settings.seed,
        lengths=tuple(task.lengths) if grouped and task.lengths is not None else None,
    )
