"""Scikit-learn's handwritten digits, and a small vision transformer that reads the upright ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

TEST_IMAGES = 500
BATCH = 64
NUDGED = 0.3  # share of training images that are moved; worth four percent of accuracy


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) float32 in 0..1 and labels (n,) int64."""

    images: Tensor
    labels: Tensor

    def changed(self, name: str) -> Digits:
        """The same labels with images changed in one of the ways of `CHANGES`."""
        return Digits(CHANGES[name](self.images).contiguous(), self.labels)

    def rows(self) -> list[dict[str, Tensor]]:
        """One mapping per image, as transformers' Trainer takes them."""
        pairs = zip(self.images, self.labels, strict=True)
        return [{"pixel_values": image, "labels": label} for image, label in pairs]


CHANGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda images: 1.0 - images,  # black on white
    "rotated": lambda images: torch.rot90(images, 1, (-2, -1)),  # counter-clockwise
}


def load(seed: int) -> tuple[Digits, Digits]:
    """Training and test images, split at random by `seed`."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    pixels = torch.from_numpy((images[order] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8))
    classes = torch.from_numpy(labels[order].astype(np.int64))
    return (
        Digits(pixels[TEST_IMAGES:], classes[TEST_IMAGES:]),
        Digits(pixels[:TEST_IMAGES], classes[:TEST_IMAGES]),
    )


def collator(seed: int, change: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """Makes batches of upright rows, with some moved by up to a pixel each way, then changed."""
    numbers = count(seed * 2**20 + 1)

    def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(next(numbers))
        images = torch.stack([row["pixel_values"] for row in rows])[:, 0]
        by = torch.randint(0, 3, (2, len(rows), 1), generator=generator)
        by = torch.where(torch.rand(len(rows), 1, generator=generator) < NUDGED, by, 1)
        lines, columns = by + torch.arange(8)
        place = torch.arange(len(rows))[:, None, None], lines[:, :, None], columns[:, None, :]
        moved = pad(images, (1, 1, 1, 1))[place][:, None]
        labels = torch.stack([row["labels"] for row in rows])
        return {"pixel_values": change(moved).contiguous(), "labels": labels}

    return collate


def pretrain(
    data: Digits, *, epochs: int, seed: int, progress: Callable[[int, int], None]
) -> ViTForImageClassification:
    """A vision transformer that reads these digits; torch's global generator stays as it was."""

    class Reports(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, _args: Any, state: Any, *_others: Any, **_more: Any) -> None:
            progress(round(state.epoch), epochs)

    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
            image_size=8, patch_size=2, num_channels=1, num_labels=10,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        # As large as the embedded patches: with the usual 0.02 so few images never teach the model
        # where a patch is.
        nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.5)
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, learning_rate=4e-3,
            adam_beta2=0.99, weight_decay=0.05, warmup_steps=0.15, lr_scheduler_type="cosine",
            seed=seed, per_device_train_batch_size=BATCH, save_strategy="no",
            logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, collator(seed), data.rows(), callbacks=[Reports()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()
