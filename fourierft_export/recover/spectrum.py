"""The spectrum of a difference of weights: the inverse of delta_W, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ..files.dtypes import to_name
from ..spectral.delta import Term, each_block
from ..spectral.half_spectrum import fold, roots
from ..types import Array

# Values of a block of rows: 2 MB as float64.
_BLOCK = 1 << 18
# The error of summing delta_W in float32, relative to delta_W.
ARITHMETIC = 2e-6
# An element that is off by more than this many half units was not rounded, it was changed.
FAR = 6.0
MOST_RESIDUAL = 1.5
LEAST_SIGNAL = 4.0


@dataclass(frozen=True)
class RecoveredLayer:
    """One layer whose spectrum was recovered, and how well it explains the difference."""

    name: str  # module path
    dtype: str  # safetensors dtype of its merged weight
    changed: float  # share of its weights that differ from the base's
    # What the spectrum leaves of the difference, relative to what rounding to `dtype` leaves (as
    # root mean squares): near 1 or below for a true FourierFT delta.
    residual: float
    uncertainty: float  # expected error of the spectrum from rounding, relative to its size
    objection: str  # why the difference is no FourierFT delta; empty if it may be one


def compute_spectrum(before: Array, after: Array, entries: Array, scaling: float) -> Array:
    """Compute the n coefficients of delta_W = after - before, for n entries (u, v), as float64.

    By orthogonality of the cosines: sum over p, q of delta_W cos(2 pi (u p / M + v q / N)) is
    scaling * c / 2, or scaling * c where the entry is its own mirror image. Entries that mirror
    each other are one degree of freedom, and share it equally.
    """
    rows, columns = before.shape
    u, v = fold(entries, (rows, columns))
    own_mirror = (v == 0) | (2 * v == columns)
    u = np.where(own_mirror, np.minimum(u, -u % rows), u)
    table = roots(rows).conj()
    total = np.zeros(len(u))
    for part in _row_blocks(before):
        half = np.fft.rfft(_difference(before[part], after[part]), axis=1)[:, v]
        half *= table[np.arange(part.start, part.start + len(half))[:, None] * u % rows]
        total += half.real.sum(axis=0)
    itself = own_mirror & (2 * u % rows == 0)
    _, group, sizes = np.unique(u * columns + v, return_inverse=True, return_counts=True)
    shares = sizes[group.reshape(-1)]
    return np.asarray(total * np.where(itself, 1.0, 2.0) / (scaling * shares))


def judge_spectrum(name: str, before: Array, after: Array, term: Term) -> RecoveredLayer:
    """Judge how well a term explains `after` - `before`, by the rounding of `after`'s dtype."""
    sums: list[tuple[int, int, float, float, float]] = []
    count, n = before.size, len(term.spectrum)
    # The squares of the errors that are expected of rounding to these values.
    halves = (_half_unit(after[part]) for part in _row_blocks(after))
    rounding = math.fsum(float(np.square(half).sum()) for half in halves) / 3
    # What the spectrum's own errors, from rounding, may cost in an element of delta_W.
    reach = FAR * math.sqrt(rounding * n) / count

    def put(_layer: int, rows: slice, delta: Array) -> None:
        difference = _difference(before[rows], after[rows])
        left = difference - delta
        largest = float(np.abs(delta).max(initial=0.0))
        far = np.abs(left) > FAR * _half_unit(after[rows]) + reach + 10 * ARITHMETIC * largest
        changed = int(np.count_nonzero(difference))
        squares = (float(np.square(x, dtype=np.float64).sum()) for x in (left, delta))
        sums.append((rows.start, changed, float(np.count_nonzero(far)), *squares))

    each_block(before.shape, [term], put)
    _, changed, far, left, delta = (math.fsum(c) for c in zip(*sorted(sums), strict=True))
    noise = rounding + ARITHMETIC**2 * delta
    residual = math.sqrt(left / noise) if noise else math.inf if left else 0.0
    # Mean energy in the spectrum's directions, relative to that in all others: near 1 where the
    # difference has nothing to do with these entries.
    rest = left / max(count - n, 1)
    signal = delta / n / rest if rest else math.inf
    objection = ""
    if changed and residual > MOST_RESIDUAL:
        objection = f"the difference leaves {residual:.3g} times what rounding leaves"
    elif changed and far:
        objection = f"{far:.0f} elements differ by more than rounding explains"
    elif changed and signal < LEAST_SIGNAL:
        objection = "the difference lies no more in these entries than in others"
    power = math.fsum(np.square(term.spectrum.astype(np.float64)).tolist())
    # Rounding errors of variance noise/count at every element, seen through the sum above.
    variance = 2 * noise * n / term.scaling**2
    return RecoveredLayer(
        name,
        to_name(after.dtype),
        changed=changed / count,
        residual=residual,
        uncertainty=math.sqrt(variance / power) if power else math.inf,
        objection=objection,
    )


def _row_blocks(values: Array) -> list[slice]:
    step = max(1, _BLOCK // values.shape[1])
    return [slice(at, at + step) for at in range(0, len(values), step)]


def _half_unit(values: Array) -> Array:
    """Return half the distance of each value to its neighbour in its dtype, as float64."""
    if values.dtype == np.float64:
        return np.asarray(np.spacing(np.abs(values)) / 2)
    spacing = np.spacing(np.abs(values.astype(np.float32))).astype(np.float64)
    if values.dtype == ml_dtypes.bfloat16:
        spacing *= 2.0**16
    elif values.dtype == np.float16:
        spacing = np.maximum(spacing * 2.0**13, 2.0**-24)
    return np.asarray(spacing / 2)


def _difference(before: Array, after: Array) -> Array:
    return np.asarray(after.astype(np.float64) - before.astype(np.float64))
