"""A small task whose items per row differ, so that a mean of means would show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourierft_export.train.task import Batch, StepResult, TrainingTask

MakeTask = Callable[..., TrainingTask]


class Tagger(nn.Module):
    """A class for each item of a row: two layers of different shapes, dropout, a head."""

    def __init__(self, dropout: float, norm: bool) -> None:
        super().__init__()
        self.down = nn.Linear(12, 20)
        self.norm = nn.BatchNorm1d(20) if norm else nn.Identity()
        self.up = nn.Linear(20, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.down(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(torch.tanh(self.up(torch.tanh(hidden)))))


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    longest = max(len(labels) for _, labels in rows)
    x = torch.zeros(len(rows), longest, 12)
    y = torch.full((len(rows), longest), -100)
    for i, (items, labels) in enumerate(rows):
        x[i, : len(items)], y[i, : len(labels)] = items, labels
    return {"x": x, "y": y}


def step(model: nn.Module, batch: Batch) -> StepResult:
    logits, y = model(batch["x"]).flatten(0, 1), batch["y"].flatten()
    right = (logits.argmax(-1) == y).sum()
    loss = F.cross_entropy(logits.float(), y, reduction="sum", ignore_index=-100)
    return StepResult(loss, int((y >= 0).sum()), {"right": right, "all": (y >= 0).sum()})


def scores(sums: Any) -> dict[str, float]:
    return {"accuracy": float(sums["right"]) / float(sums["all"])}


def small_task(
    rows: int = 40, dropout: float = 0.0, norm: bool = False, evals: bool = True
) -> TrainingTask:
    """The same task every time, new."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tagger(dropout, norm).eval()
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(12, 3, generator=generator)
    made = []
    for i in range(rows + 20):
        x = torch.randn(1 + i % 5, 12, generator=generator)
        made.append((x, (x @ truth).argmax(-1)))
    return TrainingTask(
        model=model,
        train=made[:rows],
        eval=made[rows:] if evals else None,
        collate=collate,
        step=step,
        metrics=scores,
        metric="accuracy",
        higher_is_better=True,
        modules_to_save=("head",),
        lengths=[len(labels) for _, labels in made[:rows]],
    )


@pytest.fixture(scope="session")
def make_task() -> MakeTask:
    """`make(rows=40, dropout=0.0, norm=False, evals=True)`: a small task."""
    return small_task
