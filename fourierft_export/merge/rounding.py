"""Rounding a float32 sum to 16 bits as if it had been exact.

W + delta_W is summed in float32 and then rounded to bfloat16 or float16. The two roundings agree
with a single one except where the float32 sum falls exactly between two 16-bit values: there the
exact sum, a little above or below, decides. Such elements are few (one in 2^16 for bfloat16), so
they are worked out in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..spectral.delta import Term

Array = np.ndarray[Any, np.dtype[Any]]

# Cosines worked out at a time: 8 MB of them.
_COSINES = 1 << 20
_ROWS = 64


def rounded_once(
    total: Array, weight: Array, terms: Sequence[Term], *, transposed: bool, dtype: np.dtype[Any]
) -> Array:
    """`total`, the float32 sum of `weight` and the terms' delta_W, in a narrower float dtype.

    Args:
        total: float32, (out, in), or (in, out) when `transposed`.
        weight: what was added to, any float dtype.
        terms: what was added.
        transposed: as for `spectral.delta.add_delta_weight`.
        dtype: float16 or bfloat16.

    Returns:
        A new array: each element is the nearest to W + delta_W, ties to even.
    """
    result = np.empty(total.shape, dtype)
    found = []
    for start in range(0, len(total), _ROWS):
        rows = total[start : start + _ROWS]
        result[start : start + _ROWS] = rows
        first, second = np.nonzero(_halfway(rows, dtype))
        found.append((first + start, second))
    undecided = tuple(np.concatenate(axis) for axis in zip(*found, strict=True))
    p, q = undecided[::-1] if transposed else undecided
    exact = weight[undecided].astype(np.float64)
    for term in terms:
        exact += delta_at(term, p, q, total.shape[::-1] if transposed else total.shape)
    # The 16-bit values on both sides: what one float32 step down and up in magnitude rounds to.
    bits = total[undecided].view(np.uint32)
    low, high = (near.view(np.float32).astype(dtype) for near in (bits - 1, bits + 1))
    to_low = np.abs(exact - low.astype(np.float64))
    to_high = np.abs(high.astype(np.float64) - exact)
    nearest = np.where(to_low < to_high, low, high)
    result[undecided] = np.where(to_low == to_high, result[undecided], nearest)
    return result


def _halfway(values: Array, dtype: np.dtype[Any]) -> Array:
    """Where a float32 value lies exactly between two neighbours of a 16-bit dtype."""
    bits = values.view(np.uint32)
    if dtype != np.float16:
        return np.asarray(bits & 0xFFFF == 0x8000)
    # Below 2^-14 float16's values are the multiples of 2^-24; at and beyond 65520 lies infinity.
    size = np.abs(values)
    tiny = np.where(size < 2.0**-14, size * 2.0**25, 0)
    normal = (size >= 2.0**-14) & (size < 65520) & (bits & 0x1FFF == 0x1000)
    return np.asarray(normal | (tiny % 2 == 1))


def delta_at(term: Term, p: Array, q: Array, shape: tuple[int, ...]) -> Array:
    """Single elements of delta_W in float64, straight from its definition.

    Args:
        term: spectrum (n,), entries (n, 2) and scaling.
        p, q: int64 (k,), rows and columns.
        shape: (M, N) of delta_W.
    """
    rows, columns = shape
    u, v = term.entries[:, 0], term.entries[:, 1]
    c = term.spectrum.astype(np.float64) * (float(term.scaling) / (rows * columns))
    step = max(1, _COSINES // max(c.size, 1))
    parts = [np.zeros(0)]
    for at in range(0, p.size, step):
        some_p, some_q = p[at : at + step, None], q[at : at + step, None]
        # Phases are whole numbers until they become an angle: that keeps them exact.
        turns = (some_p * u % rows) / rows + (some_q * v % columns) / columns
        parts.append(np.cos(2 * np.pi * turns) @ c)
    return np.concatenate(parts)
