"""delta_W from a spectrum: the readable reference, the fast form, and adding it to a weight.

FourierFT (arXiv 2405.03003, eq. 2-4; PEFT: tuners/fourierft/layer.py, get_delta_weight):

    delta_W = Re(ifft2(S)) * scaling,   S[u_k, v_k] = c_k, else 0
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fourierft_export.errors import UsageError
from fourierft_export.spectral.entries import Entries, check_shape
from fourierft_export.spectral.half_spectrum import half_spectrum

Float32 = npt.NDArray[np.float32]
AnyFloat = npt.NDArray[Any]  # numpy's own floats or ml_dtypes.bfloat16


class Term(NamedTuple):
    """One adapter's change of one layer."""

    spectrum: AnyFloat
    entries: Entries
    scaling: float


def reference_delta(
    spectrum: AnyFloat, entries: Entries, shape: tuple[int, int], scaling: float
) -> npt.NDArray[np.float64]:
    """delta_W straight from its definition, in double precision.

    Args:
        spectrum: (n,), any float dtype.
        entries: int64 (n, 2), pairs (u, v).
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.

    Returns:
        float64 (M, N).

    Raises:
        UsageError: sizes that do not fit together.
    """
    shape = check_term(spectrum, entries, shape)
    dense = np.zeros(shape, np.complex128)
    np.add.at(dense, (entries[:, 0], entries[:, 1]), spectrum.astype(np.float64))
    return np.asarray(np.fft.ifft2(dense).real * float(scaling), dtype=np.float64)


def delta_weight(
    spectrum: AnyFloat, entries: Entries, shape: tuple[int, int], scaling: float
) -> Float32:
    """delta_W in float32 by the half-spectrum form; arguments and errors as `reference_delta`."""
    delta = np.zeros(check_term(spectrum, entries, shape), np.float32)
    _add_into(delta, Term(spectrum, entries, scaling))
    return delta


def add_delta_weight(
    weight: AnyFloat,
    terms: Iterable[Term],
    *,
    transposed: bool = False,
    out_dtype: npt.DTypeLike | None = None,
) -> AnyFloat:
    """`weight` plus the delta_W of every term, summed in float32 and rounded once.

    Args:
        weight: (out, in), or (in, out) when `transposed`; float32, float16 or bfloat16
            (ml_dtypes). It is not changed.
        terms: the adapters' changes; each may have its own entries and scaling.
        transposed: the weight is stored as (in, out), as GPT-2's Conv1D does.
        out_dtype: of the result; by default that of `weight`.

    Returns:
        A new array of the weight's shape.

    Raises:
        UsageError: sizes that do not fit together.
    """
    total = np.array(weight, dtype=np.float32)
    upright = total.T if transposed else total
    for term in terms:
        check_term(term.spectrum, term.entries, upright.shape)
        _add_into(upright, term)
    return total.astype(weight.dtype if out_dtype is None else out_dtype, copy=False)


def check_term(spectrum: AnyFloat, entries: Entries, shape: tuple[int, ...]) -> tuple[int, int]:
    """`shape` as plain integers, once spectrum, entries and shape fit together."""
    if len(shape) != 2:
        raise UsageError("delta_W", expected="a shape of two sizes", found=repr(shape))
    rows, columns = check_shape((shape[0], shape[1]))
    if entries.ndim != 2 or entries.shape[1] != 2 or spectrum.shape != (len(entries),):
        raise UsageError(
            "spectrum",
            expected=f"shape ({len(entries)},), one coefficient for each of the entries (n, 2)",
            found=f"spectrum of shape {spectrum.shape}, entries of shape {entries.shape}",
        )
    if len(entries) and not (
        entries.min() >= 0 and entries[:, 0].max() < rows and entries[:, 1].max() < columns
    ):
        raise UsageError(
            "spectral entries",
            expected=f"0 <= u < {rows} and 0 <= v < {columns}",
            found=f"values from {entries.min(axis=0).tolist()} to {entries.max(axis=0).tolist()}",
            remedy="derive them from this layer's shape",
        )
    return rows, columns


def _add_into(total: Float32, term: Term) -> None:
    """Add delta_W to `total` (M, N), a few rows and their mirror images at a time."""
    rows, columns = total.shape
    shared = half_spectrum(term.entries, (rows, columns))
    for start, block in shared.blocks(term.spectrum, float(term.scaling)):
        values = np.fft.irfft(block, columns, axis=1)
        stop = start + len(values)
        total[start:stop] += values
        # Rows 1 .. (M-1)//2 have a mirror image: row M-p, columns -q.
        first, last = max(start, 1), min(stop, (rows + 1) // 2)
        if first < last:
            mirrored = values[first - start : last - start][::-1]
            target = total[rows - last + 1 : rows - first + 1]
            target[:, :1] += mirrored[:, :1]
            target[:, 1:] += mirrored[:, :0:-1]
