"""The numbers of a merge: one tensor in, one tensor out, rounded once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.container import FLOAT_DTYPES
from ..checkpoint.dtypes import to_name, to_numpy
from ..errors import BadInputError
from ..spectral.delta import Term, add_delta_weight, delta_weight
from .rounding import rounded_once

Array = np.ndarray[Any, np.dtype[Any]]

# The bits of the exponent, all of them set in NaN and infinity, of the floats that are stored.
_EXPONENT = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}


class Merged(NamedTuple):
    """A changed weight.

    Attributes:
        value: in the output's dtype.
        survival: share of its elements that differ from the base's, rounded the same way.
    """

    value: Array
    survival: float


def merged(weight: Array, terms: list[Term], *, transposed: bool, dtype: str, name: str) -> Merged:
    """A weight plus the delta_W of every term.

    Args:
        weight: (out, in), or (in, out) when `transposed`; float64, float32, float16 or bfloat16.
        terms: what is added.
        transposed: the weight is stored as (in, out).
        dtype: safetensors dtype of the result.
        name: of the tensor, for errors.

    Raises:
        BadInputError: the result does not fit in `dtype`.
    """
    out_dtype = to_numpy(dtype)
    with np.errstate(over="ignore"):
        if weight.dtype == np.float64:
            value = _merged_float64(weight, terms, transposed).astype(out_dtype)
        else:
            value = add_delta_weight(weight, terms, transposed=transposed, out_dtype=np.float32)
            if out_dtype.itemsize == 2:
                value = rounded_once(value, weight, terms, transposed=transposed, dtype=out_dtype)
            value = value.astype(out_dtype, copy=False)
        before = weight.astype(out_dtype, copy=False)
    _refuse_overflow(weight, value, name)
    changed = np.count_nonzero(_bits(value) != _bits(before))
    return Merged(value, changed / max(value.size, 1))


def _merged_float64(weight: Array, terms: list[Term], transposed: bool) -> Array:
    """As `add_delta_weight`, for weights that float32 cannot hold."""
    total = np.array(weight)
    upright = total.T if transposed else total
    for term in terms:
        upright += delta_weight(term.spectrum, term.entries, upright.shape, term.scaling)
    return total


def converted(value: Array, dtype: str, name: str) -> Array:
    """A float tensor in another float dtype; any other tensor as it is.

    Raises:
        BadInputError: a finite element becomes infinite.
    """
    if to_name(value.dtype) not in FLOAT_DTYPES or to_name(value.dtype) == dtype:
        return value
    with np.errstate(over="ignore"):
        result = value.astype(to_numpy(dtype))
    _refuse_overflow(value, result, name)
    return result


def _refuse_overflow(before: Array, after: Array, name: str) -> None:
    now = _count_not_finite(after)
    there = _count_not_finite(before) if now else 0
    if now > there:
        raise BadInputError(
            f"tensor {name}",
            expected=f"values that {after.dtype.name} can hold",
            found=f"{now - there} that overflow to infinity or are not numbers",
            remedy="choose a dtype with a wider range: --dtype bfloat16 or float32"
            if after.dtype.itemsize == 2
            else "the adapter's scaling or spectrum is too large: check where it came from",
        )


def _count_not_finite(value: Array) -> int:
    # By bits: numpy has no fast isfinite for float16 and bfloat16.
    _, exponent = _EXPONENT[to_name(value.dtype)]
    return int(np.count_nonzero((_bits(value) & exponent) == exponent))


def _bits(value: Array) -> Array:
    kind, _ = _EXPONENT[to_name(value.dtype)]
    return np.ascontiguousarray(value).view(kind)
