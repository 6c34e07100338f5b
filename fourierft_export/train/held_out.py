"""Rows to score by, where a task has none: some of those that it would learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import UsageError
from .order import hold_out
from .settings import TrainSettings
from .task import TrainingTask


def with_rows_to_score(
    task: TrainingTask, settings: TrainSettings
) -> tuple[TrainingTask, tuple[str, ...]]:
    """The task, with some of its training rows to score by if it has none."""
    if not len(task.train):
        raise UsageError("training rows", expected="at least one", found="none")
    if task.eval is not None or not settings.eval_share or len(task.train) < 2:
        return (task if task.eval else replace(task, eval=None)), ()
    learn, scored = hold_out(len(task.train), settings.eval_share, seed=settings.seed)
    lengths = None if task.lengths is None else [task.lengths[i] for i in learn]
    told = f"no rows to score were given: {len(scored)} of {len(task.train)} training rows"
    split = replace(
        task, train=SomeRows(task.train, learn), eval=SomeRows(task.train, scored), lengths=lengths
    )
    return split, (f"{told} are held out",)


class SomeRows(Sequence[Any]):
    """Some of the rows of another sequence, read when they are used."""

    def __init__(self, rows: Sequence[Any], numbers: list[int]) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return self.rows[self.numbers[place]]
