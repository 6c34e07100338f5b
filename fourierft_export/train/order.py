"""Which rows meet in which batch: a function of seed and epoch, whatever the number of processes.

The global generators are not touched, and nothing has to be remembered to go on in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

WINDOW = 50  # batches of random rows that are sorted by length among themselves


def epoch_batches(
    rows: int, batch_size: int, *, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """The batches of an epoch: every row once, the last batch may be smaller.

    Args:
        rows: how many there are.
        batch_size: rows of a batch, over all processes.
        seed: of the run.
        epoch: from 0.
        lengths: of the rows; rows of like length then meet, in batches of random order.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    if lengths is None:
        return _split(order, batch_size)
    batches: list[list[int]] = []
    for window in _split(order, batch_size * WINDOW):
        batches += _split(sorted(window, key=lambda row: -lengths[row]), batch_size)
    # The smaller batch stays last, so that every epoch has it at the same place.
    whole = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    places = torch.randperm(len(whole), generator=generator).tolist()
    return [whole[place] for place in places] + rest


def mixed_seed(*numbers: int) -> int:
    """One seed from several: different for (1, 2) and (2, 1), the same on every machine."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x5851F42D4C957F2D + number + 0x14057B7EF767814F) % 2**64
        mixed ^= mixed >> 29
    return mixed % 2**63


def share(batch: Sequence[int], rank: int, world: int, parts: int) -> list[list[int]]:
    """What process `rank` takes of a batch, in `parts` of like size; some may be empty.

    All processes' shares, one after another, are the batch.
    """
    pieces = _even(batch, world)
    return _even(pieces[rank], parts)


def _even(items: Sequence[int], count: int) -> list[list[int]]:
    edges = [len(items) * i // count for i in range(count + 1)]
    return [list(items[a:b]) for a, b in pairwise(edges)]


def _split(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def hold_out(rows: int, portion: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Rows to learn from and rows to score, at random: at least one of each, in rising order."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, 0x401D))
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    scored = min(max(1, round(rows * portion)), rows - 1)
    return sorted(order[scored:]), sorted(order[:scored])
