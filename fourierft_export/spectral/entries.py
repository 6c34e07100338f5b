"""Spectral entries from a seed, bit for bit those of `torch.randperm`, without torch.

PEFT (tuners/fourierft/layer.py) draws `torch.randperm(M * N, generator=seeded on the CPU)[:n]` and
splits each index i into (i // N, i % N). That permutes M * N numbers to keep n of them. torch's
CPU generator is MT19937 seeded by `init_genrand`, which is numpy's legacy `RandomState`, so the
same first n numbers follow from O(n) memory:

* "small" (M * N < 214,748,364, and every size before torch 2.6) is a forward Fisher-Yates shuffle:
  the first n places are final after n steps, and a hash map holds the few values that moved.
* "r64" (from that size on) is an inside-out shuffle on 64-bit draws: every draw may change a kept
  place, so all are drawn, in blocks.
"""

from __future__ import annotations

import hashlib
import operator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..types import Entries

ENTRY_RULES = ("small", "r64")

# torch.randperm changes its algorithm here: floor((2**32 - 1) / 20).
R64_FROM = (2**32 - 1) // 20
# No layer comes near; a hostile shape must not keep the r64 rule drawing for hours.
MAX_POSITIONS = 2**33
_BLOCK = 1 << 20


def current_rule(shape: tuple[int, int]) -> str:
    """The entry rule that current torch follows for a delta_W of `shape` (out, in)."""
    rows, columns = check_shape(shape)
    return "small" if rows * columns < R64_FROM else "r64"


def spectral_entries(
    seed: int, shape: tuple[int, int], n_frequency: int, rule: str | None = None
) -> Entries:
    """The entries (u, v) of a spectrum, as PEFT derives them from its `random_loc_seed`.

    They are int64 (n_frequency, 2), read-only and shared: copy them before changing them.

    Args:
        seed: any integer; taken modulo 2**32, as torch's generator does.
        shape: (out_features, in_features) of the layer.
        n_frequency: how many entries, 1 to out_features * in_features.
        rule: one of `ENTRY_RULES`; by default the one current torch follows for this shape.
    """
    rows, columns = check_shape(shape)
    try:
        n = operator.index(n_frequency)
    except TypeError:
        n = 0
    if not 1 <= n <= rows * columns:
        raise UsageError(
            "n_frequency",
            expected=f"an integer from 1 to {rows * columns}, the number of weights of the layer",
            found=repr(n_frequency),
            remedy="lower n_frequency, or leave this layer out",
        )
    name = current_rule((rows, columns)) if rule is None else rule
    if name not in ENTRY_RULES:
        raise UsageError(
            "entry rule",
            expected=" or ".join(ENTRY_RULES),
            found=repr(rule),
            remedy="leave it out to follow current torch",
        )
    return _entries(operator.index(seed) % 2**32, rows, columns, n, name)


def entries_sha256(entries: npt.NDArray[np.integer]) -> str:
    """Hex sha256 of `entries` (n, 2) as little-endian uint64 in C order."""
    return hashlib.sha256(entries.astype("<u8").tobytes()).hexdigest()


def check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """`shape` as two plain positive integers with a product that the rules can draw from."""
    try:
        rows, columns = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1 or rows * columns > MAX_POSITIONS:
        raise UsageError(
            "layer shape",
            expected=f"two positive integers with a product of at most {MAX_POSITIONS}",
            found=repr(shape),
        )
    return rows, columns


@lru_cache(maxsize=32)
def _entries(seed: int, rows: int, columns: int, n: int, rule: str) -> Entries:
    draw = np.random.RandomState(seed)
    prefix = (_small_prefix if rule == "small" else _r64_prefix)(draw, rows * columns, n)
    entries = np.stack(np.divmod(prefix, columns), axis=1)
    entries.flags.writeable = False
    return entries


def _small_prefix(draw: np.random.RandomState, positions: int, n: int) -> npt.NDArray[np.int64]:
    """First n of a forward Fisher-Yates shuffle: step i swaps places i and i + draw % (left)."""
    steps = np.arange(n, dtype=np.int64)
    draws = draw.randint(0, 2**32, size=n, dtype=np.uint32).astype(np.int64)
    picks = (steps + draws % (positions - steps)).tolist()
    moved: dict[int, int] = {}
    for i, pick in enumerate(picks):
        picks[i] = moved.get(pick, pick)
        moved[pick] = moved.pop(i, i)
    return np.array(picks, dtype=np.int64)


def _r64_prefix(draw: np.random.RandomState, positions: int, n: int) -> npt.NDArray[np.int64]:
    """First n of an inside-out shuffle: step i does z = draw % (i + 1); r[i] = r[z]; r[z] = i.

    A step at i >= n reads and writes beyond n, except for `r[z] = i` where z < n: so places from n
    on need not be kept.
    """
    prefix = np.zeros(n, dtype=np.int64)
    for start in range(0, positions, _BLOCK):
        steps = np.arange(start, min(start + _BLOCK, positions), dtype=np.uint64)
        # Full-range 64-bit draws: high half first, exactly torch's random64.
        draws = draw.randint(0, 2**64, size=steps.size, dtype=np.uint64)
        z = np.remainder(draws, steps + np.uint64(1), out=draws).view(np.int64)
        inside = min(max(n - start, 0), steps.size)
        for i, place in enumerate(z[:inside].tolist(), start):
            prefix[i] = prefix[place]
            prefix[place] = i
        later = inside + np.flatnonzero(z[inside:] < n)
        # Where a place is hit twice numpy keeps the last assignment, as the loop would.
        prefix[z[later]] = later + start
    return prefix
