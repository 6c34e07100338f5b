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
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import BadInputError
from ..files.dtypes import FLOAT_DTYPES, to_name, to_numpy
from ..spectral.delta import Term, each_block
from ..types import Array


class Merged(NamedTuple):
    """A changed weight in the output's dtype, and what rounding did to the change."""

    value: Array
    survival: float  # share of its elements that differ from the base's, rounded the same way
    error: float | None  # of what was added, relative to delta_W; None for NaN in the weight


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

    Args:
        weight: (out, in), or (in, out) when `transposed`; of any float dtype.
        dtype: safetensors name of the result's dtype; BadInputError if it cannot hold the result.
        name: of the tensor, for this error.
        overwrite: the result may use the weight's memory.
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
    _, changed, overflowed, missed, added = (
        math.fsum(sums) for sums in zip(*sorted(blocks), strict=True)
    )
    if overflowed > 0:
        raise _overflow_error(name, out_dtype, int(overflowed))
    error = math.sqrt(missed / added) if added else 0.0
    finite = math.isfinite(error)
    return Merged(value, changed / max(value.size, 1), error if finite else None)


class _Scratch(threading.local):
    """Memory that each thread uses again: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = math.prod(shape)
        kept = self._kept.get(use)
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._kept[use] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


def _add(
    before: Array, delta: Array, after: Array, scratch: _Scratch
) -> tuple[int, int, float, float]:
    """Put rows of a weight plus float32 rows of delta_W in `after`, which may be `before`.

    Returns how many elements changed and overflowed, and the squares of what rounding cost and of
    delta_W.
    """
    kind = np.dtype(np.float64 if before.dtype == np.float64 else np.float32)
    shape = before.shape
    wide = scratch.array("wide", shape, kind)
    wide[...] = before
    total = np.add(wide, delta, out=scratch.array("total", shape, kind))
    if after.dtype.itemsize == 2 and kind == np.float32:
        break_ties(total, wide, delta, after.dtype, scratch.array("tie", shape, np.dtype(bool)))
    rounded = scratch.array("rounded", shape, after.dtype)
    rounded[...] = total
    same = before if before.dtype == after.dtype else wide.astype(after.dtype)
    differ = scratch.array("differ", shape, np.dtype(bool))
    changed = int(np.count_nonzero(np.not_equal(_bits(rounded), _bits(same), out=differ)))
    overflowed = 0
    if not max(total.max(), -total.min()) < float(ml_dtypes.finfo(after.dtype).max):
        overflowed = _count_not_finite(rounded) - _count_not_finite(before)
    missed = scratch.array("total", shape, kind)  # the total is not needed any more
    missed[...] = rounded
    missed -= wide
    missed -= delta
    after[...] = rounded
    return changed, overflowed, _square_sum(missed), _square_sum(delta)


def break_ties(
    total: Array, weight: Array, delta: Array, dtype: np.dtype[Any], scratch: Array
) -> None:
    """Move float32 sums halfway between two values of a 16-bit dtype towards the exact sums."""
    flat = total.reshape(-1)
    low_half = flat.view(np.uint16)[0 if sys.byteorder == "little" else 1 :: 2]
    # Values halfway between two of float16 end in 12 clear bits. So do others, which round to the
    # same value after a step.
    mask, ending = (0xFFFF, 0x8000) if dtype == ml_dtypes.bfloat16 else (0xFFF, 0)
    tied = np.equal(
        low_half if mask == 0xFFFF else low_half & mask, ending, out=scratch.reshape(-1)
    )
    at = np.flatnonzero(tied)
    if at.size:
        exact = weight.reshape(-1)[at].astype(np.float64) + delta.reshape(-1)[at]
        sums = flat[at]
        side = np.where(exact > sums, np.float32(np.inf), np.float32(-np.inf))
        flat[at] = np.where(exact == sums, sums, np.nextafter(sums, side))


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


def _square_sum(values: Array) -> float:
    """Sum the squares, in float64 where float32 cannot hold the sum."""
    flat = values.reshape(-1)
    small = float(np.einsum("i,i->", flat, flat))  # unlike a dot product, the same on any threads
    return small if math.isfinite(small) else float(np.square(flat.astype(np.float64)).sum())


def _count_not_finite(value: Array) -> int:
    return value.size - int(np.count_nonzero(np.isfinite(value)))


def _bits(value: Array) -> Array:
    return np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
