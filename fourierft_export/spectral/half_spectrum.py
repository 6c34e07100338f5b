"""The half-spectrum form of delta_W: half of its rows, each by one real inverse transform.

delta_W is real and even (delta_W[-p, -q] = delta_W[p, q], indices modulo M, N), so rows 0..M//2
say it all, and row p is the real inverse DFT, of length N, of

    H[p, v] = scaling / M * sum over entries k with v_k = v of w_k c_k exp(2 pi i u_k p / M)

once every entry with v > N/2 is folded onto its mirror image (-u, -v), which is the same basis
function. w is 1/2, as the real transform counts a column and its mirror, and 1 in the columns 0
and N/2, which are their own mirror.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fourierft_export.spectral.entries import Entries, check_shape

Float32 = npt.NDArray[np.float32]
Complex64 = npt.NDArray[np.complex64]

ROWS_PER_BLOCK = 64
# From this many entries per column on, one FFT down each column beats summing entry by entry.
_DENSE_FROM = 16


@dataclass(frozen=True)
class HalfSpectrum:
    """What all spectra over the same entries and shape share.

    Attributes:
        shape: (M, N) of delta_W.
        u, v: int64 (n,), the entries folded to 0 <= v <= N // 2.
        weight: float64 (n,), the w_k above.
        rounds: pairs (which entries, their columns) such that no column occurs twice in a pair;
            together they hold every entry once.
        step: complex64 (ROWS_PER_BLOCK, n), exp(2 pi i u j / M) for j rows into a block.
        jump: complex64 (blocks, n), the same at the first row of each block.
    """

    shape: tuple[int, int]
    u: Entries
    v: Entries
    weight: npt.NDArray[np.float64]
    rounds: tuple[tuple[Entries, Entries], ...]
    step: Complex64
    jump: Complex64

    @property
    def kept_rows(self) -> int:
        """Rows 0..M//2; the rest are mirror images."""
        return self.shape[0] // 2 + 1

    def blocks(
        self, spectrum: npt.NDArray[np.generic], scaling: float
    ) -> Iterator[tuple[int, Complex64]]:
        """Yield (first row p, H[p : p + rows]) over the kept rows, `ROWS_PER_BLOCK` at a time.

        A yielded block is valid until the next one is asked for.
        """
        amplitude = spectrum.astype(np.float64) * self.weight * (scaling / self.shape[0])
        columns = self.shape[1] // 2 + 1
        real_columns = [0] if self.shape[1] % 2 else [0, columns - 1]
        if self.v.size > _DENSE_FROM * columns:
            yield from self._dense_blocks(amplitude)
            return
        block = np.zeros((ROWS_PER_BLOCK, columns), np.complex64)
        for index, start in enumerate(range(0, self.kept_rows, ROWS_PER_BLOCK)):
            rows = min(ROWS_PER_BLOCK, self.kept_rows - start)
            terms = self.step[:rows] * (self.jump[index] * amplitude).astype(np.complex64)
            first, *others = self.rounds
            block[:rows, first[1]] = terms[:, first[0]]
            for which, where in others:
                block[:rows, where] += terms[:, which]
            # Backends differ on what an imaginary part in these columns means.
            block.imag[:rows, real_columns] = 0
            yield start, block[:rows]

    def _dense_blocks(self, amplitude: npt.NDArray[np.float64]) -> Iterator[tuple[int, Complex64]]:
        rows, columns = self.shape
        half = np.zeros((rows, columns // 2 + 1), np.complex64)
        np.add.at(half, (self.u, self.v), amplitude.astype(np.complex64))
        half = np.fft.ifft(half, axis=0, norm="forward").astype(np.complex64, copy=False)
        half.imag[:, 0] = 0
        if columns % 2 == 0:
            half.imag[:, -1] = 0
        for start in range(0, self.kept_rows, ROWS_PER_BLOCK):
            yield start, half[start : min(start + ROWS_PER_BLOCK, self.kept_rows)]


def half_spectrum(entries: Entries, shape: tuple[int, int]) -> HalfSpectrum:
    """The shared part for `entries` (n, 2) and `shape`; the last few are cached."""
    plain = np.ascontiguousarray(entries, dtype=np.int64)
    return _half_spectrum(plain.tobytes(), check_shape(shape))


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
    entries = np.frombuffer(entries_bytes, dtype=np.int64).reshape(-1, 2)
    rows, columns = shape
    u, v = fold(entries, shape)
    own_mirror = (v == 0) | (2 * v == columns)
    # Phases stay integers until they index the table: angles built in float32 cost two digits.
    table = roots(rows).astype(np.complex64)
    steps = np.arange(min(ROWS_PER_BLOCK, rows // 2 + 1))
    jumps = np.arange(0, rows // 2 + 1, ROWS_PER_BLOCK)
    return HalfSpectrum(
        shape=shape,
        u=u,
        v=v,
        weight=np.where(own_mirror, 1.0, 0.5),
        rounds=_rounds(v),
        step=table[steps[:, None] * u % rows],
        jump=table[jumps[:, None] * u % rows],
    )


def _rounds(v: Entries) -> tuple[tuple[Entries, Entries], ...]:
    """Split entries so that each part names every column at most once."""
    order = np.argsort(v, kind="stable")
    ordered = v[order]
    is_first = np.r_[True, ordered[1:] != ordered[:-1]]
    run_start = np.maximum.accumulate(np.where(is_first, np.arange(v.size), 0))
    occurrence = np.arange(v.size) - run_start
    by_round = np.argsort(occurrence, kind="stable")
    ends = np.cumsum(np.bincount(occurrence))
    parts = np.split(order[by_round], ends[:-1])
    return tuple((part, v[part]) for part in parts)
