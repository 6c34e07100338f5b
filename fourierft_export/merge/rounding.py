"""The arithmetic of a merge: a weight plus delta_W, as if rounded once from the exact sum.

W + delta_W is summed in float32 and then rounded to bfloat16 or float16. The two roundings agree
with a single one except where the float32 sum falls exactly between two 16-bit values: there the
exact sum, a little above or below, decides. Such elements are few (one in 2^16 for bfloat16), so
they are added up again in float64.
"""

from __future__ import annotations

import math
import sys
import threading
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import BadInputError
from ..files.dtypes import FLOAT_DTYPES, to_name, to_numpy
from ..spectral.delta import Term, each_block
from ..types import Array

# The bits of the exponent, all of them set in NaN and infinity, of the floats that are stored.
_EXPONENT = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}


class Merged(NamedTuple):
    """A changed weight in the output's dtype.

    Attributes:
        survival: share of its elements that differ from the base's, rounded the same way.
        error: of what was really added, relative to delta_W, as Frobenius norms; 0 for no change.
    """

    value: Array
    survival: float
    error: float


def add_deltas(
    weight: Array,
    terms: list[Term],
    *,
    transposed: bool,
    dtype: str,
    name: str,
    overwrite: bool = False,
) -> Merged:
    """Add the delta_W of every term to a weight, block by block, and round once to `dtype`.

    The sum is within half a unit in the last place of the exact one, and 1e-6 of delta_W.

    Args:
        weight: (out, in), or (in, out) when `transposed`; of any float dtype.
        terms: what to add.
        transposed: how the weight is stored.
        dtype: safetensors name of the result's dtype.
        name: of the tensor, for errors.
        overwrite: the result may use the weight's memory.

    Raises:
        BadInputError: the result does not fit in `dtype`; names the tensor.
    """
    out_dtype = to_numpy(dtype)
    in_place = overwrite and weight.dtype == out_dtype
    value = weight if in_place else np.empty(weight.shape, out_dtype)
    blocks: list[tuple[int, int, int, float, float]] = []
    scratch = _Scratch()

    def add_block(_layer: int, rows: slice, delta: Array) -> None:
        blocks.append((rows.start, *_add(weight[rows], delta, value[rows], scratch)))

    with np.errstate(over="ignore", invalid="ignore"):
        each_block(weight.shape, terms, add_block, transposed)
    # Threads finish in any order, and the sums must not depend on it.
    _, changed, not_finite, error, delta = (
        math.fsum(sums) for sums in zip(*sorted(blocks), strict=True)
    )
    if not_finite > 0:
        raise _overflow_error(name, out_dtype, int(not_finite))
    survival = changed / max(value.size, 1)
    return Merged(value, survival, math.sqrt(error / delta) if delta else 0.0)


class _Scratch(threading.local):
    """Memory that each thread uses again: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array for `use` with undefined content."""
        size = math.prod(shape)
        kept = self._kept.get(use)
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._kept[use] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


def _add(
    before: Array, delta: Array, after: Array, scratch: _Scratch
) -> tuple[int, int, float, float]:
    """Put rows of a weight plus float32 rows of delta_W in `after`, which may be `before`.

    Returns the numbers of elements that changed and that are not finite any more, and the sums of
    squares of what rounding cost and of delta_W.
    """
    kind = np.dtype(np.float64 if before.dtype == np.float64 else np.float32)
    shape = before.shape
    wide = scratch.array("wide", shape, kind)
    wide[...] = before
    total = np.add(wide, delta, out=scratch.array("total", shape, kind))
    rounded = scratch.array("rounded", shape, after.dtype)
    if after.dtype.itemsize == 2 and kind == np.float32:
        round_once(total, wide, delta, rounded, scratch.array("halfway", shape, np.dtype(bool)))
    else:
        rounded[...] = total
    same = before if before.dtype == after.dtype else wide.astype(after.dtype)
    differ = scratch.array("differ", shape, np.dtype(bool))
    changed = int(np.count_nonzero(np.not_equal(_bits(rounded), _bits(same), out=differ)))
    not_finite = 0
    if not max(total.max(), -total.min()) < _largest(after.dtype):
        not_finite = _count_not_finite(rounded) - _count_not_finite(before)
    missed = scratch.array("total", shape, kind)  # the total is not needed any more
    missed[...] = rounded
    missed -= wide
    missed -= delta
    after[...] = rounded
    return changed, not_finite, _square_sum(missed), _square_sum(delta)


def round_once(total: Array, weight: Array, delta: Array, result: Array, scratch: Array) -> None:
    """Put in `result`, of 16 bits, the nearest of its values to weight + delta, ties to even.

    All arrays are C-contiguous. `total` is their float32 sum; `scratch`, of bool, is overwritten.
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
    """Return the positions of float32 values halfway between two neighbours of a 16-bit dtype."""
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


def convert(value: Array, dtype: str, name: str) -> Array:
    """Convert a float tensor to another float dtype; BadInputError if it overflows."""
    if to_name(value.dtype) not in FLOAT_DTYPES or to_name(value.dtype) == dtype:
        return value
    with np.errstate(over="ignore"):
        result = value.astype(to_numpy(dtype))
    overflowed = _count_not_finite(result)
    overflowed -= _count_not_finite(value) if overflowed else 0
    if overflowed > 0:
        raise _overflow_error(name, result.dtype, overflowed)
    return result


def _overflow_error(name: str, dtype: np.dtype[Any], count: int) -> BadInputError:
    return BadInputError(
        f"tensor {name}",
        expected=f"values that {dtype.name} can hold",
        found=f"{count} that overflow to infinity or are not numbers",
        remedy="choose a dtype with a wider range: --dtype bfloat16 or float32"
        if dtype.itemsize == 2
        else "the adapter's scaling or spectrum is too large: check where it came from",
    )


@cache
def _largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite value of a float dtype."""
    return float(ml_dtypes.finfo(dtype).max)


def _square_sum(values: Array) -> float:
    """Sum the squares, in float64 where float32 cannot hold the sum."""
    flat = values.reshape(-1)
    small = float(np.einsum("i,i->", flat, flat))  # unlike a dot product, the same on any threads
    return small if math.isfinite(small) else float(np.square(flat.astype(np.float64)).sum())


def _count_not_finite(value: Array) -> int:
    # By bits: numpy has no fast isfinite for float16 and bfloat16.
    _, exponent = _EXPONENT[to_name(value.dtype)]
    return int(np.count_nonzero((_bits(value) & exponent) == exponent))


def _bits(value: Array) -> Array:
    kind, _ = _EXPONENT[to_name(value.dtype)]
    return np.ascontiguousarray(value).view(kind)
