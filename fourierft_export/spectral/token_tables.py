"""Index tables of the token form: x -> x delta_W^T without ever building delta_W.

For each token x, with X = FFT(x) and y the result:

    y = Re(IFFT_unnormalised(b)),   b[u] = scaling / (M N) * sum of c_k conj(X[v_k]) over u_k = u

x is real, so X at a folded v is read from half a spectrum; y is real, so b is folded, too, and the
inverse transform is a real one. That is O(M log M + N log N + n) for a token instead of O(M N).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..types import Entries


class TokenTables(NamedTuple):
    """Where the token form reads and writes, for entries in the order given.

    Attributes:
        read: int64 (n,), v folded to 0..N // 2.
        write: int64 (n,), u folded to 0..M // 2.
        factor: float64 (n, 2), for the real and the imaginary part of X at `read`: 1/2, as the
            real inverse transform counts a bin and its mirror image, 1 in bins that are their own;
            the imaginary part changes its sign where X must be conjugated, and drops out of bins
            that are their own mirror image.
    """

    read: Entries
    write: Entries
    factor: npt.NDArray[np.float64]


def token_tables(entries: Entries, shape: tuple[int, int]) -> TokenTables:
    """The tables for `entries` (n, 2) of delta_W of `shape` (M, N)."""
    rows, columns = shape
    u, v = entries[:, 0], entries[:, 1]
    fold_u, fold_v = 2 * u > rows, 2 * v > columns
    write = np.where(fold_u, rows - u, u)
    alone = (write == 0) | (2 * write == rows)
    # b holds conj(X); reading a folded v conjugates once more, and so does writing a folded u.
    sign = np.where(fold_u == fold_v, -1.0, 1.0)
    real = np.where(alone, 1.0, 0.5)
    imaginary = np.where(alone, 0.0, 0.5 * sign)
    return TokenTables(np.where(fold_v, columns - v, v), write, np.stack([real, imaginary], axis=1))
