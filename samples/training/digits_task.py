"""A torch model of one's own in the verb `train`: it reads digits, and learns to read rotated ones.

    python samples/training/digits_task.py [-o DIR]

does what this does:

    cd samples/training
    fourierft-export train --module digits_task:rotated -o rotated.fourierft.safetensors

The factory makes the base (here it trains one; yours would load its weights) and the rows, in the
words of transformers' Trainer: the model returns its loss where it gets labels. Nothing else of
Hugging Face is involved.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fourierft_export as ff
from fourierft_export.demo import digits


class Reader(nn.Module):
    """A model of images, which returns the loss where it gets labels, as the Trainer wants it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.base(pixel_values=pixel_values).logits
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def rotated() -> dict[str, Any]:
    train, test = digits.load(seed=0)
    base = digits.pretrain(train, epochs=15, seed=0, progress=lambda *_: None)
    return {
        "model": Reader(base),
        "train_dataset": train.changed("rotated").rows(),
        "eval_dataset": test.changed("rotated").rows(),
        "compute_metrics": accuracy,
        "metric_for_best_model": "accuracy",
    }


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the bundle in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        path = (out or Path(temporary)) / "rotated.fourierft.safetensors"
        report = ff.train_adapter(ff.TrainingTask(**rotated()), path, force=True)
        before, best = report.before["accuracy"], report.best["accuracy"]
        print(f"rotated digits: {before:.1%} -> {best:.1%}, {report.bundle_bytes:,} bytes")
