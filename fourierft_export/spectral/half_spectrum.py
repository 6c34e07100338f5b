"""Rows of delta_W from half of its spectrum: tables that layers share, and two ways to use them.

delta_W is real and even (delta_W[-p, -q] = delta_W[p, q], indices modulo M, N), so rows 0..M//2
say it all, and row p is the real inverse DFT, of length N, of

    H[p, v] = scaling / M * sum over entries k with v_k = v of w_k c_k exp(2 pi i u_k p / M)

once every entry with v > N/2 is folded onto its mirror image (-u, -v), which is the same basis
function. w is 1/2, as the real transform counts a column and its mirror, and 1 in the columns 0
and N/2, which are their own mirror. The two ways (`cost.DELTA_PATHS`):

* rows: H a few rows at a time, entry by entry, then one real FFT for each row;
* columns: H by one FFT down each column, for many entries per column; then the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..types import Entries

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Complex64 = npt.NDArray[np.complex64]

# A block's values stay in a core's second-level cache: about 1 MB.
_VALUES_PER_BLOCK = 1 << 18


@dataclass(frozen=True)
class HalfSpectrum:
    """What all spectra over the same entries and shape share.

    Entries are reordered in rounds that hold at most one entry of each column: round r has one for
    each of the first `rounds[r]` columns, fullest first, so that whole rounds can be added up.

    Attributes:
        shape: (M, N) of delta_W.
        block_rows: rows made at a time.
        order: int64 (n,), the entry at each place.
        u, v: int64 (n,), the entries in that order, folded to 0 <= v <= N // 2.
        weight: float64 (n,), the w_k above in that order.
        rounds: entries in each round, never increasing; they add up to n.
        source: int64 (N // 2 + 1,), for each column the place of its first entry, n if it has none.
        step: complex64 (block_rows, n), exp(2 pi i u j / M) for j rows into a block.
        jump: complex64 (blocks, n), the same at the first row of each block.
    """

    shape: tuple[int, int]
    block_rows: int
    order: Entries
    u: Entries
    v: Entries
    weight: Float64
    rounds: tuple[int, ...]
    source: Entries
    step: Complex64
    jump: Complex64

    def amplitudes(self, spectra: npt.NDArray[Any], scaling: float) -> Float64:
        """(L, n) spectra in this order, each coefficient times w scaling / M."""
        return spectra.astype(np.float64)[:, self.order] * (self.weight * (scaling / self.shape[0]))

    def block(self, number: int) -> slice:
        """The rows of a block; the last block ends at row M // 2."""
        start = number * self.block_rows
        return slice(start, min(start + self.block_rows, self.shape[0] // 2 + 1))


# (rows of delta_W that these are, layer, float32 values); the values are overwritten afterwards.
Rows = tuple[slice, int, Float32]
RowMaker = Callable[[HalfSpectrum, Float64, Iterable[int]], Iterator[Rows]]


def rows_by_fft(shared: HalfSpectrum, amplitudes: Float64, blocks: Iterable[int]) -> Iterator[Rows]:
    """The path "rows": all `amplitudes` (L, n) at each block, so that they share its phases."""
    columns = shared.shape[1]
    pairs = np.repeat(amplitudes.astype(np.float32), 2, axis=1)
    width = pairs.shape[1]
    half = np.zeros((shared.block_rows, columns // 2 + 1), np.complex64)
    terms = np.zeros((shared.block_rows, width + 2), np.float32)  # the last place stays zero
    values = np.empty((shared.block_rows, columns), np.float32)
    for block in blocks:
        rows = shared.block(block)
        count = slice(rows.stop - rows.start)
        phases = shared.step[count] if block == 0 else shared.step[count] * shared.jump[block]
        parts = phases.view(np.float32)  # real and imaginary parts take the same real factor
        for layer, amplitude in enumerate(pairs):
            np.multiply(parts, amplitude, out=terms[count, :width])
            _add_rounds(terms[count], shared.rounds)
            # take with mode "clip" is the one gather in numpy that fills its output directly.
            chosen = terms[count].view(np.complex64)
            np.take(chosen, shared.source, axis=1, out=half[count], mode="clip")
            yield rows, layer, _real_rows(half[count], values[count])


def rows_by_column_fft(
    shared: HalfSpectrum, amplitudes: Float64, blocks: Iterable[int]
) -> Iterator[Rows]:
    """The path "columns": needs 2 M N bytes for a layer's half spectrum."""
    rows, columns = shared.shape
    wanted = list(blocks)
    for layer, amplitude in enumerate(amplitudes):
        dense = np.zeros((columns // 2 + 1, rows), np.float32)
        np.add.at(dense, (shared.v, shared.u), amplitude.astype(np.float32))
        # The coefficients are real, so half of this transform says it all, too.
        half = np.ascontiguousarray(np.fft.rfft(dense, axis=1).T.astype(np.complex64, copy=False))
        np.conjugate(half, out=half)
        values = np.empty((shared.block_rows, columns), np.float32)
        for part in map(shared.block, wanted):
            yield part, layer, _real_rows(half[part], values[: part.stop - part.start])


ROW_MAKERS: dict[str, RowMaker] = {"rows": rows_by_fft, "columns": rows_by_column_fft}


def half_spectrum(entries: Entries, shape: tuple[int, int]) -> HalfSpectrum:
    """The shared part for `entries` (n, 2) and `shape`; those used last are kept."""
    return _half_spectrum(entries.astype(np.int64, copy=False).tobytes(), shape)


def fold(entries: Entries, shape: tuple[int, int]) -> tuple[Entries, Entries]:
    """The u and v of `entries`, each folded onto the mirror image that has v <= N // 2."""
    rows, columns = shape
    u, v = entries[:, 0], entries[:, 1]
    mirrored = 2 * v > columns
    return np.where(mirrored, -u % rows, u), np.where(mirrored, columns - v, v)


def roots(size: int) -> npt.NDArray[np.complex128]:
    """exp(2 pi i k / size) for k in 0..size-1, in double precision."""
    angles = np.arange(size) * (2 * np.pi / size)
    return np.asarray(np.cos(angles) + 1j * np.sin(angles))


@lru_cache(maxsize=8)
def _half_spectrum(entries_bytes: bytes, shape: tuple[int, int]) -> HalfSpectrum:
    rows, columns = shape
    u, v = fold(np.frombuffer(entries_bytes, dtype=np.int64).reshape(-1, 2), shape)
    order, source, rounds = _in_rounds(v, columns // 2 + 1)
    u, v = u[order], v[order]
    kept = rows // 2 + 1
    blocks = -(-kept * columns // _VALUES_PER_BLOCK)
    block_rows = -(-kept // (blocks + blocks % 2 if blocks > 1 else 1))  # even, for two threads
    # Phases stay integers until they index the table: angles built in float32 cost two digits.
    table = roots(rows).astype(np.complex64)
    return HalfSpectrum(
        shape=shape,
        block_rows=block_rows,
        order=order,
        u=u,
        v=v,
        weight=np.where((v == 0) | (2 * v == columns), 1.0, 0.5),
        rounds=rounds,
        source=source,
        step=table[np.arange(block_rows)[:, None] * u % rows],
        jump=table[np.arange(0, kept, block_rows)[:, None] * u % rows],
    )


def _in_rounds(bins: Entries, count: int) -> tuple[Entries, Entries, tuple[int, ...]]:
    """`order`, `source` and `rounds` of a `HalfSpectrum` whose entries have these columns (n,)."""
    distinct, bin_of, sizes = np.unique(bins, return_inverse=True, return_counts=True)
    fullest = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(fullest)
    rank[fullest] = np.arange(fullest.size)
    bin_rank = rank[bin_of.reshape(-1)]
    by_bin = np.argsort(bin_rank, kind="stable")
    starts = np.cumsum(sizes[fullest]) - sizes[fullest]
    round_of = np.empty_like(by_bin)
    round_of[by_bin] = np.arange(by_bin.size) - starts[bin_rank[by_bin]]
    source = np.full(count, bins.size, dtype=np.int64)
    source[distinct] = rank
    return np.lexsort((bin_rank, round_of)), source, tuple(np.bincount(round_of).tolist())


def _add_rounds(terms: Float32, rounds: tuple[int, ...]) -> None:
    """Add all rounds of complex values, given as pairs of reals, onto the first, in place."""
    start = 2 * rounds[0]
    for size in rounds[1:]:
        terms[:, : 2 * size] += terms[:, start : start + 2 * size]
        start += 2 * size


def _real_rows(half: Complex64, values: Float32) -> Float32:
    """The real inverse FFT of each row of `half`, into `values`."""
    # Backends differ on what an imaginary part in the self-mirrored columns would mean.
    half.imag[:, 0] = 0
    if values.shape[1] % 2 == 0:
        half.imag[:, -1] = 0
    return np.fft.irfft(half, values.shape[1], axis=1, out=values)  # type: ignore[arg-type, return-value]
