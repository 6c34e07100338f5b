"""entries: the first n of torch.randperm, as PEFT draws them, against the toolkit's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from harness import Row, faster, in_turn

from fourierft_export.spectral.entries import R64_FROM, spectral_entries


def randperm(seed: int, size: int, n: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n]


def entries() -> Iterator[Row]:
    yield case("4096x4096, n 1000", (4096, 4096), 300.0)
    # The smallest layer of the large rule. torch takes half a minute, so each side runs once.
    yield case("large rule", (4, R64_FROM // 4), 3.0, seconds=0, least=1, warm_up=0)


def case(title: str, shape: tuple[int, int], bar: float, **rounds: int) -> Row:
    n, size = 1000, shape[0] * shape[1]
    # A new seed for every call: entries that were asked for before are kept.
    seeds = count(100)

    def ours() -> np.ndarray:
        return spectral_entries(next(seeds), shape, n)

    def peer() -> torch.Tensor:
        return randperm(7, size, n)

    if not np.array_equal(spectral_entries(7, shape, n) @ [shape[1], 1], peer().numpy()):
        raise SystemExit(f"entries, {title}: not those of torch.randperm")
    return faster("entries", title, *in_turn(ours, peer, **rounds), bar, "torch.randperm")


BARS = {"entries": entries}
