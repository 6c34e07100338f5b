"""Rounding a float32 sum to 16 bits as if it had been exact.

W + delta_W is summed in float32 and then rounded to bfloat16 or float16. The two roundings agree
with a single one except where the float32 sum falls exactly between two 16-bit values: there the
exact sum, a little above or below, decides. Such elements are few (one in 2^16 for bfloat16), so
they are added up again in float64.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from ..types import Array


def round_once(total: Array, weight: Array, delta: Array, result: Array, scratch: Array) -> None:
    """Put in `result` the nearest of its values to weight + delta, ties to even.

    Args:
        total: float32, C-contiguous: the sum of the two.
        weight, delta: float32, what was added up.
        result: float16 or bfloat16, C-contiguous.
        scratch: bool, C-contiguous; overwritten.
    """
    result[...] = total
    flat = result.reshape(-1)
    at = _halfway(total.reshape(-1), result.dtype, scratch.reshape(-1))
    if not at.size:
        return
    exact = weight.reshape(-1)[at].astype(np.float64) + delta.reshape(-1)[at]
    # The 16-bit values on both sides: what one float32 step down and up in magnitude rounds to.
    bits = total.reshape(-1)[at].view(np.uint32)
    low, high = (near.view(np.float32).astype(result.dtype) for near in (bits - 1, bits + 1))
    to_low = np.abs(exact - low.astype(np.float64))
    to_high = np.abs(high.astype(np.float64) - exact)
    flat[at] = np.where(to_low == to_high, flat[at], np.where(to_low < to_high, low, high))


def _halfway(values: Array, dtype: np.dtype[Any], scratch: Array) -> Array:
    """Where float32 values lie exactly between two neighbours of a 16-bit dtype: positions."""
    low_half = values.view(np.uint16)[0 if sys.byteorder == "little" else 1 :: 2]
    if dtype == ml_dtypes.bfloat16:
        return np.flatnonzero(np.equal(low_half, 0x8000, out=scratch))
    # Few end in 12 clear bits, as every value between two of float16 does.
    at = np.flatnonzero(np.equal(low_half & 0xFFF, 0, out=scratch))
    some = values[at]
    size = np.abs(some)
    # Below 2^-14 float16's values are the multiples of 2^-24; at and beyond 65520 lies infinity.
    tiny = np.where(size < 2.0**-14, size * 2.0**25, 0)
    normal = (size >= 2.0**-14) & (size < 65520) & (some.view(np.uint32) & 0x1FFF == 0x1000)
    return np.asarray(at[normal | (tiny % 2 == 1)])
