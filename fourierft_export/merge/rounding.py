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

Array = np.ndarray[Any, np.dtype[Any]]


def rounded_once(total: Array, weight: Array, delta: Array, dtype: np.dtype[Any]) -> Array:
    """`total`, the float32 sum of `weight` and `delta`, in a 16-bit float dtype.

    Args:
        total: float32, C-contiguous.
        weight, delta: float32, what was added up.
        dtype: float16 or bfloat16.

    Returns:
        A new array: each element is the nearest to weight + delta, ties to even.
    """
    result = total.astype(dtype)
    (at,) = np.nonzero(_halfway(total.reshape(-1), dtype))
    if not at.size:
        return result
    exact = weight.reshape(-1)[at].astype(np.float64) + delta.reshape(-1)[at]
    # The 16-bit values on both sides: what one float32 step down and up in magnitude rounds to.
    bits = total.reshape(-1)[at].view(np.uint32)
    low, high = (near.view(np.float32).astype(dtype) for near in (bits - 1, bits + 1))
    to_low = np.abs(exact - low.astype(np.float64))
    to_high = np.abs(high.astype(np.float64) - exact)
    flat = result.reshape(-1)
    flat[at] = np.where(to_low == to_high, flat[at], np.where(to_low < to_high, low, high))
    return result


def _halfway(values: Array, dtype: np.dtype[Any]) -> Array:
    """Where a float32 value lies exactly between two neighbours of a 16-bit dtype."""
    if dtype == ml_dtypes.bfloat16:
        low_half = values.view(np.uint16)[0 if sys.byteorder == "little" else 1 :: 2]
        return np.asarray(low_half == 0x8000)
    # Few have the last 12 bits clear, as a value between two of float16 must.
    halfway = values.view(np.uint32) & 0xFFF == 0
    (at,) = np.nonzero(halfway)
    size = np.abs(values[at])
    # Below 2^-14 float16's values are the multiples of 2^-24; at and beyond 65520 lies infinity.
    tiny = np.where(size < 2.0**-14, size * 2.0**25, 0)
    normal = (size >= 2.0**-14) & (size < 65520) & (values[at].view(np.uint32) & 0x1FFF == 0x1000)
    halfway[at] = normal | (tiny % 2 == 1)
    return np.asarray(halfway)
