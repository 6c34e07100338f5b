"""The exact singular value decomposition of delta_W, without making delta_W.

delta_W is a sum of waves cos(a + b) = cos a cos b - sin a sin b, where a depends on the row and b
on the column. So in the orthonormal bases of cosines and sines over rows and over columns it is two
sparse matrices, one of cosines and one of sines, with one number for each coefficient. Two
coefficients share a singular vector only if a chain of equal frequencies links them: each such
component is decomposed alone. With few coefficients (n below about (M + N) / 4) all components are
tiny; with many there are at most two blocks of half the layer's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..types import Entries
from .delta import AnyFloat, check_term

Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
LARGE = 512  # from this size on, eigenvectors of the Gram matrix are several times faster
SMALLEST = 1e-7  # values relative to the largest that a Gram matrix in double precision resolves


@dataclass(frozen=True)
class _Block:
    """The decomposition of one component.

    Attributes:
        phase: 1 for cosines, -1j for sines: what makes Re(phase exp(i x)) of them.
        rows, columns: frequencies.
        left: (rows, k); right: (columns, k).
    """

    phase: complex
    rows: Ints
    columns: Ints
    left: Float64
    right: Float64


@dataclass(frozen=True)
class SingularValues:
    """delta_W = sum_i values[i] left_i right_i^T.

    Attributes:
        shape: (M, N) of delta_W.
        values: all that are not 0, falling.
        places: for each value, its block and the column in that block.
    """

    shape: tuple[int, int]
    values: Float64
    blocks: tuple[_Block, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def energies(self) -> Float64:
        """Sum of the squares of the first 0, 1, 2, ... values; the last is |delta_W|^2."""
        return np.concatenate([[0.0], np.cumsum(self.values**2)])

    def factors(self, rank: int) -> tuple[Float64, Float64]:
        """(M, rank) and (rank, N), whose product is the best approximation of this rank.

        Each has the square roots of the values; beyond the rank of delta_W there are zeros.
        """
        rows, columns = (np.zeros((rank, size // 2 + 1), np.complex128) for size in self.shape)
        for i, (number, j) in enumerate(self.places[:rank]):
            block, root = self.blocks[number], np.sqrt(self.values[i])
            rows[i, block.rows] = root * block.phase * block.left[:, j]
            columns[i, block.columns] = root * block.phase * block.right[:, j]
        left, right = (
            np.fft.irfft(half * _norms(size), size, axis=1)
            for half, size in zip((rows, columns), self.shape, strict=True)
        )
        return left.T, right


def singular_values(
    spectrum: AnyFloat, entries: Entries, shape: tuple[int, int], scaling: float
) -> SingularValues:
    """Decomposes delta_W.

    Args:
        spectrum: (n,), any float dtype.
        entries: int64 (n, 2), pairs (u, v).
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.
    """
    rows, columns = shape = check_term(spectrum, entries, shape)
    u, v = entries.T
    amplitude = spectrum.astype(np.float64) * (float(scaling) / (rows * columns))
    # cos(-a) = cos a and sin(-a) = -sin a: frequencies above the half are negative.
    low = np.minimum(u, rows - u), np.minimum(v, columns - v)
    opposite = (2 * u > rows) != (2 * v > columns)
    cosines = amplitude * _norms(rows)[low[0]] * _norms(columns)[low[1]]
    has_sine = (low[0] % rows * 2 % rows != 0) & (low[1] % columns * 2 % columns != 0)
    sines = np.where(has_sine, np.where(opposite, cosines, -cosines), 0.0)
    blocks: list[_Block] = []
    found: list[tuple[float, int, int]] = []
    for phase, values in ((1 + 0j, cosines), (-1j, sines)):
        for at, to, left, sizes, right in _components(*low, values):
            found += [(float(size), len(blocks), j) for j, size in enumerate(sizes)]
            blocks.append(_Block(phase, at, to, left, right))
    found.sort(key=lambda one: (-one[0], *one[1:]))
    sizes = np.array([size for size, *_ in found])
    places = tuple((number, j) for _, number, j in found)
    return SingularValues(shape, sizes, tuple(blocks), places)


def _norms(size: int) -> Float64:
    """Lengths of cos(2 pi f p / size) over p, for f = 0 .. size // 2; sines have the same."""
    norms = np.full(size // 2 + 1, np.sqrt(size / 2))
    norms[0] = np.sqrt(size)
    if size % 2 == 0:
        norms[-1] = np.sqrt(size)
    return norms


def _components(
    rows: Ints, columns: Ints, values: Float64
) -> Iterator[tuple[Ints, Ints, Float64, Float64, Float64]]:
    """Decomposes a sparse matrix: row and column indices, left vectors, values, right vectors."""
    used = values != 0
    rows, columns, values = rows[used], columns[used], values[used]
    names, start = np.unique(rows, return_inverse=True)
    others, end = np.unique(columns, return_inverse=True)
    end = end + len(names)
    labels = np.arange(len(names) + len(others))
    while True:  # each node takes the smallest label among its neighbours
        smallest = np.minimum(labels[start], labels[end])
        before = labels.copy()
        np.minimum.at(labels, start, smallest)
        np.minimum.at(labels, end, smallest)
        labels = labels[labels]
        if np.array_equal(labels, before):
            break
    order = np.argsort(labels[start], kind="stable")
    cuts = np.flatnonzero(np.diff(labels[start][order])) + 1
    for members in np.split(order, cuts) if len(order) else ():
        at, i = np.unique(rows[members], return_inverse=True)
        to, j = np.unique(columns[members], return_inverse=True)
        dense = np.zeros((len(at), len(to)))
        np.add.at(dense, (i, j), values[members])
        yield at, to, *_decompose(dense)


def _decompose(matrix: Float64) -> tuple[Float64, Float64, Float64]:
    """Left vectors (m, k), values (k,) above 0 and right vectors (n, k) of a dense matrix."""
    if min(matrix.shape) < LARGE:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        kept = values > SMALLEST**2 * values[0]
        return left[:, kept], values[kept], right[kept].T
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = _decompose(matrix.T)
        return right, values, left
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    kept = squares > SMALLEST**2 * squares[-1]
    values, right = np.sqrt(squares[kept]), vectors[:, kept]
    product: Any = matrix @ right
    return product / values, values, right
