"""Which rows meet in which batch: a function of seed and epoch, whatever the number of processes.

The Trainer's own samplers give several processes other batches than one, and fill an uneven last
batch with rows that were learnt already; then two processes would not reach the losses of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch.utils.data import Sampler

from ..errors import UsageError
from .settings import TrainSettings

WINDOW = 50  # batches of random rows that are sorted by length among themselves


class EpochBatches(Sampler[list[int]]):
    """One process's share of every batch of an epoch, in `parts`; it is process `rank` of `world`.

    Rows with like `lengths` meet, in batches of random order. `batch_size` counts the rows of a
    step, over all processes and parts; a batch too small for them is an error.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int,
        lengths: Sequence[int] | None = None,
        parts: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rows, self.batch_size, self.seed, self.lengths = rows, batch_size, seed, lengths
        self.parts, self.rank, self.world, self.epoch = parts, rank, world, 0
        if min(rows, batch_size) < parts * world:
            raise UsageError(
                "batch_size",
                expected=f"at least a row for each of {world} processes and {parts} parts",
                found=f"batches of {min(rows, batch_size)} rows",
                remedy="use larger batches, fewer processes or a smaller --accumulate",
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that is gone through next."""
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Steps of an epoch. A rest of too few rows for all processes joins the batch before."""
        whole, rest = divmod(self.rows, self.batch_size)
        return whole + (rest >= self.parts * self.world)

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        batches = epoch_batches(
            self.rows, self.batch_size, seed=self.seed, epoch=self.epoch, lengths=self.lengths
        )
        if len(batches) > self.steps:
            batches[-2:] = [batches[-2] + batches[-1]]
        for batch in batches:
            yield from _even(_even(batch, self.world)[self.rank], self.parts)


def epoch_batches(
    rows: int, batch_size: int, *, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """The batches of an epoch: every row once, the last batch may be smaller."""
    generator = torch.Generator().manual_seed(_mixed_seed(seed, epoch))
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    if lengths is None:
        return _split(order, batch_size)
    batches: list[list[int]] = []
    for window in _split(order, batch_size * WINDOW):
        batches += _split(sorted(window, key=lambda row: -lengths[row]), batch_size)
    # The smaller batch stays last, so that every epoch has it at the same place.
    rest = [batches.pop()] if rows % batch_size else []
    places = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[place] for place in places] + rest


def rate_factor(step: int, steps: int, settings: TrainSettings) -> float:
    """What the peak rates are multiplied by at a step; never 0 within the run."""
    rising = math.ceil(settings.warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    return 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def _mixed_seed(*numbers: int) -> int:
    """One seed from several: different for (1, 2) and (2, 1), the same on every machine."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x5851F42D4C957F2D + number + 0x14057B7EF767814F) % 2**64
        mixed ^= mixed >> 29
    return mixed % 2**63


def _even(items: Sequence[int], count: int) -> list[list[int]]:
    edges = [len(items) * i // count for i in range(count + 1)]
    return [list(items[a:b]) for a, b in pairwise(edges)]


def _split(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
