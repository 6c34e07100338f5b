"""Scikit-learn's digits: 1,797 real handwritten images of 8 x 8 pixels, and two shifts of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import pad

TEST_IMAGES = 500

Shift = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """Images (n, 8, 8) float32 in 0..1 and labels (n,) int64."""

    images: Tensor
    labels: Tensor

    def shifted(self, shift: Shift) -> Split:
        """The same labels with changed images."""
        return Split(shift(self.images).contiguous(), self.labels)


def nudged(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A random `share` of upright images moved by up to a pixel each way, for training."""
    count, side = images.shape[:2]
    by = torch.randint(0, 3, (2, count, 1), generator=generator)
    by = torch.where(torch.rand(count, 1, generator=generator) < share, by, 1)
    rows, columns = by + torch.arange(side)
    return pad(images, (1, 1, 1, 1))[
        torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]


def upright(images: Tensor) -> Tensor:
    """The images as they are."""
    return images


def inverted(images: Tensor) -> Tensor:
    """Black on white instead of white on black."""
    return 1.0 - images


def rotated(images: Tensor) -> Tensor:
    """Turned by 90 degrees, counter-clockwise."""
    return torch.rot90(images, 1, (-2, -1))


SHIFTS: Mapping[str, Shift] = MappingProxyType({"inverted": inverted, "rotated": rotated})


def load(seed: int) -> tuple[Split, Split]:
    """Training and test images, split at random by `seed`."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    pixels = torch.from_numpy((images[order] / 16.0).astype(np.float32).reshape(-1, 8, 8))
    classes = torch.from_numpy(labels[order].astype(np.int64))
    return (
        Split(pixels[TEST_IMAGES:], classes[TEST_IMAGES:]),
        Split(pixels[:TEST_IMAGES], classes[:TEST_IMAGES]),
    )
