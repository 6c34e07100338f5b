"""The token form: x -> x delta_W^T without ever building delta_W, in numpy.

For each token x, with X = FFT(x) and y the result (MATH as in `half_spectrum`):

    y = Re(IFFT_unnormalised(b)),   b[u] = scaling / (M N) * sum of c_k conj(X[v_k]) over u_k = u

x is real, so X at a folded v is read from half a spectrum; y is real, so b is folded, too, and the
inverse transform is a real one. That is O(M log M + N log N + n) for a token instead of O(M N).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..types import Entries
from .delta import check_term
from .half_spectrum import add_rounds, in_rounds
from .threads import default_threads, run_shares

AnyFloat = npt.NDArray[Any]

# Tokens at a time: their half spectra stay in the cache.
_TOKENS = 32


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


def token_delta(
    x: AnyFloat,
    spectrum: AnyFloat,
    entries: Entries,
    shape: tuple[int, int],
    scaling: float,
    *,
    threads: int | None = None,
) -> AnyFloat:
    """The product x delta_W^T, computed in float32 (float64 if x is).

    Args:
        x: (..., N), any float dtype.
        spectrum: (n,), or per token: any shape (..., n) that broadcasts over x's leading ones,
            such as (batch, 1, n) for x (batch, length, N).
        entries: int64 (n, 2), pairs (u, v).
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.
        threads: at most this many; see `delta.delta_weight`.

    Returns:
        (..., M), of x's dtype.

    Raises:
        UsageError: sizes that do not fit together.
    """
    check_term(spectrum.reshape(-1, spectrum.shape[-1])[0], entries, shape)
    check_features(x.shape, shape)
    rows, columns = shape
    real = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    tables, order, source, rounds = _ordered_tables(
        entries.astype(np.int64, copy=False).tobytes(), (rows, columns)
    )
    n = len(order)
    tokens = x.reshape(-1, columns)
    coefficients = spectrum.astype(np.float64)[..., order] * (scaling / columns)
    if spectrum.ndim > 1:
        coefficients = np.broadcast_to(coefficients, (*x.shape[:-1], n))
    factors = (coefficients.reshape(-1, n, 1) * tables.factor).astype(real).reshape(-1, 2 * n)
    result = np.empty((len(tokens), rows), x.dtype)

    def work(blocks: range) -> None:
        terms = np.zeros((_TOKENS, 2 * n + 2), real)  # the last place stays zero
        for start in (block * _TOKENS for block in blocks):
            some = slice(start, min(start + _TOKENS, len(tokens)))
            count = slice(some.stop - start)
            spectra = np.fft.rfft(tokens[some].astype(real, copy=False), axis=1)
            chosen = np.take(spectra, tables.read, axis=1).view(real)
            factor = factors if spectrum.ndim == 1 else factors[some]
            np.multiply(chosen, factor, out=terms[count, : 2 * n])
            add_rounds(terms[count], rounds)
            half = np.take(terms[count].view(spectra.dtype), source, axis=1)
            result[some] = np.fft.irfft(half, rows, axis=1)

    limit = default_threads() if threads is None else threads
    run_shares(work, -(-len(tokens) // _TOKENS), limit)
    return result.reshape(*x.shape[:-1], rows)


def check_features(x_shape: tuple[int, ...], shape: tuple[int, int]) -> None:
    """Refuse an input whose last dimension is not in_features."""
    if not x_shape or x_shape[-1] != shape[1]:
        raise UsageError(
            "input of an adapted layer",
            expected=f"a last dimension of {shape[1]}",
            found=f"shape {tuple(x_shape)}",
        )


@lru_cache(maxsize=8)
def _ordered_tables(
    entries_bytes: bytes, shape: tuple[int, int]
) -> tuple[TokenTables, Entries, Entries, tuple[int, ...]]:
    entries = np.frombuffer(entries_bytes, dtype=np.int64).reshape(-1, 2)
    tables = token_tables(entries, shape)
    order, source, rounds = in_rounds(tables.write, shape[0] // 2 + 1)
    ordered = TokenTables(tables.read[order], tables.write[order], tables.factor[order])
    return ordered, order, source, rounds
