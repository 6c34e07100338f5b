"""A plain training loop: what learns is whatever asks for gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .digits import Shift, Split, nudged

BATCH = 64
NUDGED = 0.3  # share of images; worth one percent of accuracy on 1,297 images

Progress = Callable[[int, int], None]


def train(
    model: nn.Module,
    data: Split,
    shift: Shift,
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    seed: int,
    progress: Progress,
) -> None:
    """Train by AdamW with one warm-up and decay of the learning rate.

    Args:
        model: images (n, 8, 8) to logits (n, classes); left in eval mode.
        data: upright images and labels.
        shift: what is done to the images.
        epochs: passes over the data.
        lr: the learning rate at its peak. FourierFT's spectra want ten to a hundred times what
            weights want, since delta_W is spread over the whole matrix.
        weight_decay: AdamW's.
        seed: of the order of the images, and of how they are nudged.
        progress: called with (epochs done, epochs).
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    steps = epochs * -(-len(data.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with _one_thread():
        for epoch in range(epochs):
            progress(epoch, epochs)
            for rows in torch.randperm(len(data.labels), generator=generator).split(BATCH):
                images = shift(nudged(data.images[rows], NUDGED, generator))
                loss = F.cross_entropy(model(images), data.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    progress(epochs, epochs)
    model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread.

    Sums then do not depend on the number of cores, so a seed gives the same model on more
    machines; and for matrices as small as these, threads on a busy machine mostly wait.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Classes (n,) int64 that the model sees in images (n, 8, 8)."""
    logits: Tensor = model(images)
    return logits.argmax(-1)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of labels (n,) that were predicted."""
    return float((predicted == labels).double().mean())
