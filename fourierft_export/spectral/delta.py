"""delta_W from a spectrum: the readable reference, the fast forms, and adding it to weights.

FourierFT (arXiv 2405.03003, eq. 2-4; PEFT: tuners/fourierft/layer.py, get_delta_weight):

    delta_W = Re(ifft2(S)) * scaling,   S[u_k, v_k] = c_k, else 0

The fast forms make a block of rows at a time (`half_spectrum`) and add it and its mirror image to
the weight at once: no whole delta_W is ever allocated, and layers that share entries share their
tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..types import Entries
from .cost import choose_delta_path, useful_threads
from .entries import check_shape
from .half_spectrum import ROW_MAKERS, half_spectrum
from .thread_pool import default_threads, run_shares

Float32 = npt.NDArray[np.float32]
AnyFloat = npt.NDArray[Any]  # numpy's own floats or ml_dtypes.bfloat16
# Takes (layer, rows, float32 values of them); the values are overwritten afterwards.
Put = Callable[[int, slice, Float32], None]


class Term(NamedTuple):
    """One adapter's change of one layer."""

    spectrum: AnyFloat
    entries: Entries
    scaling: float


def reference_delta(
    spectrum: AnyFloat, entries: Entries, shape: tuple[int, int], scaling: float
) -> npt.NDArray[np.float64]:
    """delta_W straight from its definition: float64 (M, N).

    Args:
        spectrum: (n,), any float dtype.
        entries: int64 (n, 2), pairs (u, v).
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.
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
    """A new array: `weight` plus the delta_W of every term, summed in float32, rounded once.

    Args:
        weight: (out, in), or (in, out) when `transposed`; float32, float16 or bfloat16
            (ml_dtypes). It is not changed.
        terms: the adapters' changes; each may have its own entries and scaling.
        transposed: the weight is stored as (in, out), as GPT-2's Conv1D does.
        out_dtype: of the result; by default that of `weight`.
        threads: at most this many; by default `thread_pool.default_threads()`.
    """
    target = np.empty(weight.shape, weight.dtype if out_dtype is None else out_dtype)
    changes = list(terms)
    if changes:
        each_block(weight.shape, changes, adder([weight], [target]), transposed, threads)
    else:
        target[...] = weight
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


def adder(sources: Sequence[AnyFloat] | None, targets: Sequence[AnyFloat]) -> Put:
    """A `put` that fills L arrays with their source (which may be the target) plus delta_W.

    Without `sources` the targets, of any float dtype, become delta_W alone.
    """

    def put(layer: int, where: slice, values: Float32) -> None:
        target = targets[layer][where]
        if sources is None:
            target[...] = values
        elif target.dtype == sources[layer].dtype in (np.float32, np.float64):
            np.add(sources[layer][where], values, out=target)
        else:
            values += sources[layer][where].astype(np.float32)
            target[...] = values

    return put


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
        threads: at most this many; by default `thread_pool.default_threads()`.
    """
    for term in terms:
        check_term(term.spectrum, term.entries, stored[::-1] if transposed else stored)
    # delta_W is linear: all terms are one, over all of their entries; so the sum is rounded once.
    spectrum = np.concatenate([t.spectrum.astype(np.float64) * float(t.scaling) for t in terms])
    entries = np.concatenate([term.entries for term in terms])
    if transposed:  # delta_W transposed is delta_W with u and v exchanged
        entries = entries[:, ::-1]
    # Not by the number of threads: the values must not depend on it.
    path = choose_delta_path((stored[0], stored[1]), len(entries))
    rebuild((stored[0], stored[1]), spectrum[None], entries, 1.0, put, threads, path)


def rebuild(
    shape: tuple[int, int],
    spectra: AnyFloat,
    entries: Entries,
    scaling: float,
    put: Put,
    threads: int | None = None,
    path: str | None = None,
) -> None:
    """Call `put` with (layer, rows, float32 values) until every delta_W is complete.

    Args:
        shape: of each delta_W.
        spectra: (L, n), any float dtype.
        entries: int64 (n, 2), pairs (u, v) with u along the first dimension.
        scaling: multiplies every delta_W.
        put: called from several threads; the values are overwritten afterwards.
        threads: at most this many; by default `thread_pool.default_threads()`.
        path: one of `cost.DELTA_PATHS`; by default the cheapest.
    """
    rows, columns = shape
    shared = half_spectrum(entries, shape)
    amplitudes = shared.amplitudes(spectra, float(scaling))
    count, blocks = len(spectra), range(len(shared.jump))
    limit = default_threads() if threads is None else threads
    used = useful_threads(shape, count, limit)
    path = path or choose_delta_path(shape, len(entries), layers=count, threads=used)
    make_rows = ROW_MAKERS[path]

    def work(layers: range, blocks: range) -> None:
        for where, index, values in make_rows(shared, amplitudes[layers], blocks):
            layer = layers[index]
            # Rows 1 .. (M-1)//2 have a mirror image: row M-p holds columns -q.
            first, last = max(where.start, 1), min(where.stop, (rows + 1) // 2)
            if first < last:
                mirrored = np.empty((last - first, columns), np.float32)
                upside_down = values[first - where.start : last - where.start][::-1]
                mirrored[:, 0] = upside_down[:, 0]
                mirrored[:, 1:] = upside_down[:, :0:-1]
                put(layer, slice(rows - last + 1, rows - first + 1), mirrored)
            put(layer, where, values)

    if path == "columns" or count >= used:
        run_shares(lambda layers: work(layers, blocks), count, min(used, count))
    else:
        run_shares(lambda share: work(range(count), share), len(blocks), used)
