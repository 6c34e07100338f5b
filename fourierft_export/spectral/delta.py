"""delta_W from a spectrum: the readable reference, the fast forms, and adding it to weights.

FourierFT (arXiv 2405.03003, eq. 2-4; PEFT: tuners/fourierft/layer.py, get_delta_weight):

    delta_W = Re(ifft2(S)) * scaling,   S[u_k, v_k] = c_k, else 0

The fast forms make a block of rows at a time (`half_spectrum`), and add it and its mirror image
where they belong (`blocks`): no delta_W is ever allocated, and layers that share entries share
their tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..types import Entries
from .blocks import AnyFloat, Put, adder, rebuild_blocks
from .cost import choose_delta_path
from .entries import check_shape


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


def add_delta_weight(
    weight: AnyFloat,
    terms: Iterable[Term],
    *,
    transposed: bool = False,
    out_dtype: npt.DTypeLike | None = None,
    threads: int | None = None,
) -> AnyFloat:
    """`weight` plus the delta_W of every term, summed in float32 and rounded once.

    Args:
        weight: (out, in), or (in, out) when `transposed`; float32, float16 or bfloat16
            (ml_dtypes). It is not changed.
        terms: the adapters' changes; each may have its own entries and scaling.
        transposed: the weight is stored as (in, out), as GPT-2's Conv1D does.
        out_dtype: of the result; by default that of `weight`.
        threads: at most this many; by default `threads.default_threads()`.

    Returns:
        A new array of the weight's shape.

    Raises:
        UsageError: sizes that do not fit together.
    """
    target = np.empty(weight.shape, weight.dtype if out_dtype is None else out_dtype)
    _add_terms(weight, target, list(terms), transposed, threads)
    return target


def check_term(spectrum: AnyFloat, entries: Entries, shape: tuple[int, ...]) -> tuple[int, int]:
    """`shape` as plain integers, once spectrum, entries and shape fit together."""
    if len(shape) != 2:
        raise UsageError("delta_W", expected="a shape of two sizes", found=repr(shape))
    rows, columns = check_shape((shape[0], shape[1]))
    count = len(entries)
    if count == 0 or entries.shape != (count, 2) or spectrum.shape != (count,):
        raise UsageError(
            "spectrum",
            expected="a spectrum of shape (n,) and entries of shape (n, 2), n at least 1",
            found=f"spectrum of shape {spectrum.shape}, entries of shape {entries.shape}",
        )
    low, high = entries.min(axis=0), entries.max(axis=0)
    if low.min() < 0 or high[0] >= rows or high[1] >= columns:
        raise UsageError(
            "spectral entries",
            expected=f"0 <= u < {rows} and 0 <= v < {columns}",
            found=f"values from {low.tolist()} to {high.tolist()}",
            remedy="derive them from this layer's shape",
        )
    return rows, columns


def _upright(entries: Entries, transposed: bool) -> Entries:
    """Entries for the weight as stored: delta_W transposed is delta_W with u and v exchanged."""
    return entries[:, ::-1] if transposed else entries


def _add_terms(
    source: AnyFloat, target: AnyFloat, terms: list[Term], transposed: bool, threads: int | None
) -> None:
    if not terms:
        if target is not source:
            target[...] = source
        return
    each_block(source.shape, terms, adder([source], [target]), transposed, threads)


def each_block(
    stored: tuple[int, ...],
    terms: Sequence[Term],
    put: Put,
    transposed: bool = False,
    threads: int | None = None,
) -> None:
    """Call `put` with every row of the sum of the terms' delta_W, once, in blocks.

    Args:
        stored: shape of the weight as stored.
        terms: at least one; each may have its own entries and scaling.
        put: called with (0, rows, float32 values of them); from several threads, and the values
            are overwritten afterwards. Blocks and values do not depend on the number of threads.
        transposed: the weight is stored as (in, out).
        threads: at most this many; by default `threads.default_threads()`.

    Raises:
        UsageError: sizes that do not fit together.
    """
    for term in terms:
        check_term(term.spectrum, term.entries, stored[::-1] if transposed else stored)
    # delta_W is linear: all terms are one, over all of their entries; so the sum is rounded once.
    spectrum = np.concatenate([t.spectrum.astype(np.float64) * float(t.scaling) for t in terms])
    entries = np.concatenate([term.entries for term in terms])
    shape = (stored[0], stored[1])
    path = choose_delta_path(shape, len(entries))
    rebuild_blocks(shape, spectrum[None], _upright(entries, transposed), 1.0, threads, put, path)


def rebuild(
    sources: Sequence[AnyFloat] | None,
    targets: Sequence[AnyFloat],
    spectra: AnyFloat,
    entries: Entries,
    scaling: float,
    threads: int | None,
) -> None:
    """Fill each target with its source plus the delta_W of its spectrum.

    Args:
        sources: L arrays of one shape as stored, of any float dtype; None for delta_W alone.
        targets: L arrays of that shape; those of `sources` themselves to add in place.
        spectra: (L, n), any float dtype.
        entries: int64 (n, 2), pairs (u, v) with u along the targets' first dimension.
        scaling: multiplies every delta_W.
        threads: at most this many; by default `threads.default_threads()`.
    """
    shape = (targets[0].shape[0], targets[0].shape[1])
    rebuild_blocks(shape, spectra, entries, scaling, threads, adder(sources, targets))
