"""Constant tables of cosines and sines for discrete Fourier transforms as matrix products."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# Measured in ONNX Runtime, 1 to 512 tokens, n 1000.
MAX_DENSE = 1024


def is_dense(shape: tuple[int, int]) -> bool:
    """Whether the dense form is the faster one for layers of this shape."""
    return max(shape) <= MAX_DENSE or any(min(factors(length)) < 8 for length in shape)


def factors(length: int) -> tuple[int, int]:
    """The factors a <= b of a length that are nearest to each other."""
    a = next(a for a in range(int(length**0.5), 0, -1) if length % a == 0)
    return a, length // a


def _angles(products: npt.NDArray[np.int64], length: int) -> Float64:
    """Phases are reduced as integers: angles built in float32 would cost two digits."""
    angles: Float64 = (2 * np.pi / length) * (products % length).astype(np.float64)
    return angles


@lru_cache(maxsize=8)
def dense_table(length: int) -> Float32:
    """[length, 2 (length // 2 + 1)]: cosines, then sines, of 2 pi f q / length, over length."""
    positions = np.arange(length, dtype=np.int64)
    angles = _angles(np.outer(positions, positions[: length // 2 + 1]), length)
    return (np.hstack([np.cos(angles), np.sin(angles)]) / length).astype(np.float32)


@lru_cache(maxsize=8)
def two_step_tables(length: int) -> tuple[Float32, Float32]:
    """Tables of the transform sum_q x_q exp(2 pi i v q / length) / length, in two steps.

    Returns:
        [2 a, 2 a] for the sums over q1 of complex numbers (real rows first: a real x needs the
        first half), and [a, 2 b, 2 b], per v1 the twiddle factors and the sums over q2.
    """
    a, b = factors(length)
    one, two = np.arange(a, dtype=np.int64), np.arange(b, dtype=np.int64)
    angles = _angles(np.outer(one, one), a)
    first = _complex_matrix(angles) / length
    # v1 q2 + a v2 q2, as [v1, q2, v2]
    products = two[None, :, None] * (one[:, None, None] + a * two[None, None, :])
    return first.astype(np.float32), _complex_matrix(_angles(products, length)).astype(np.float32)


def _complex_matrix(angles: Float64) -> Float64:
    """exp(i angles) as a real matrix that rows (real, imaginary) are multiplied with."""
    cosine, sine = np.cos(angles), np.sin(angles)
    real, imaginary = (np.concatenate(pair, axis=-1) for pair in ((cosine, sine), (-sine, cosine)))
    matrix: Float64 = np.concatenate([real, imaginary], axis=-2)
    return matrix
