"""The dtypes of safetensors: their names, sizes, and numpy's dtypes (or those of ml_dtypes)."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64,
    "F16": np.float16, "F32": np.float32, "F64": np.float64, "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip

_NAMES = {np.dtype(value): name for name, value in _NUMPY.items()}
# Bits per element. Names that are absent here cannot be measured or copied.
DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
DTYPE_BITS |= {name: 8 * dtype.itemsize for dtype, name in _NAMES.items()}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@cache
def to_numpy(name: str) -> np.dtype[Any]:
    """Return the little-endian numpy dtype of a safetensors dtype; KeyError if none (F4)."""
    little: np.dtype[Any] = np.dtype(_NUMPY[name]).newbyteorder("<")
    return little


def has_name(dtype: np.dtype[Any]) -> bool:
    """Return whether safetensors has a numpy dtype."""
    return dtype.newbyteorder("=") in _NAMES


def to_name(dtype: np.dtype[Any]) -> str:
    """Return the safetensors name of a numpy dtype; KeyError if there is none."""
    return _NAMES[dtype.newbyteorder("=")]
