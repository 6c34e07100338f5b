"""A torch model of one's own in the verb `train`: it reads digits, and learns to read rotated ones.

    cd samples
    fourierft-export train --module digits_task:rotated -o rotated.fourierft.safetensors

The factory makes the base (here it trains one; yours would load its weights), the rows, and says
how a batch becomes a loss and a score. Nothing of Hugging Face is involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fourierft_export as ff
from fourierft_export.demo import digits, steps


def rotated() -> ff.TrainingTask:
    train, test = digits.load(seed=0)
    base = steps.pretrain(train, epochs=15, seed=0, progress=lambda *_: None)
    return ff.TrainingTask(
        model=base,
        train=rows(train.shifted(digits.rotated)),
        eval=rows(test.shifted(digits.rotated)),
        collate=collate,
        step=step,
        metrics=lambda sums: {"accuracy": (sums["right"] / sums["rows"]).item()},
        metric="accuracy",
        higher_is_better=True,
    )


def rows(split: digits.Split) -> list[tuple[Tensor, Tensor]]:
    return list(zip(split.images, split.labels, strict=True))


def collate(some: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*some, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def step(model: nn.Module, batch: Any) -> ff.StepResult:
    logits, labels = model(batch["images"]), batch["labels"]
    loss = cross_entropy(
        logits, labels, reduction="sum"
    )  # sums add up over processes; means do not
    right = (logits.detach().argmax(-1) == labels).sum()
    sums = {"right": right, "rows": torch.tensor(len(labels))}
    return ff.StepResult(loss, len(labels), sums)
