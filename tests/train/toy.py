"""Rows of tiny tasks, and a plain module with uneven rows; also for processes of their own."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourierft_export as ff

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
WORDS = (*GOOD, *BAD, "the", "a", "film", "is", "was", "very", "plot", "and", "1", ".")


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences of 3 to 9 words; the label says whether the judgement in it is good."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.randrange(2)
        words = [draw.choice(WORDS[6:]) for _ in range(draw.randrange(2, 9))]
        words.insert(draw.randrange(len(words) + 1), draw.choice(GOOD if label else BAD))
        rows.append((" ".join(words), label))
    return rows


def write_tsv(path: Path, rows: Sequence[tuple[Any, ...]], header: str = "text\tlabel") -> Path:
    lines = ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n", "utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


class Tagger(nn.Module):
    """A class for each item of a row: two layers of different shapes, dropout, a head."""

    def __init__(self, dropout: float, norm: bool) -> None:
        super().__init__()
        self.down = nn.Linear(12, 20)
        self.norm = nn.BatchNorm1d(20) if norm else nn.Identity()
        self.up = nn.Linear(20, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.down(x).transpose(1, 2)).transpose(1, 2)
        return {"logits": self.head(self.dropout(torch.tanh(self.up(torch.tanh(hidden)))))}


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(labels) for _, labels in rows)
    x = torch.zeros(len(rows), longest, 12)
    y = torch.full((len(rows), longest), -100)
    for i, (items, labels) in enumerate(rows):
        x[i, : len(items)], y[i, : len(labels)] = items, labels
    return {"x": x, "labels": y}


def tag_loss(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"].float().flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


def tag_scores(prediction: Any) -> dict[str, float]:
    inside = prediction.label_ids != -100
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right[inside].mean())}


def small_task(
    rows: int = 40, dropout: float = 0.0, norm: bool = False, evals: bool = True
) -> ff.TrainingTask:
    """The same task every time, new. Items per row differ, so that a mean of means would show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tagger(dropout, norm).eval()
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(12, 3, generator=generator)
    made = []
    for i in range(rows + 20):
        x = torch.randn(1 + i % 5, 12, generator=generator)
        made.append((x, (x @ truth).argmax(-1)))
    return ff.TrainingTask(
        model=model,
        train_dataset=made[:rows],
        eval_dataset=made[rows:] if evals else None,
        data_collator=collate,
        compute_loss_func=tag_loss,
        compute_metrics=tag_scores,
        metric_for_best_model="accuracy",
        modules_to_save=("head",),
        lengths=[len(labels) for _, labels in made[:rows]],
    )
