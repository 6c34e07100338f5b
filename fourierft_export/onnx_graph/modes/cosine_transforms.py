"""The cosine and sine transforms of a side branch, as operators of a graph.

Dense: one product with a table of both. Two-step, for lengths N = a b: two batched products, with
the twiddle factors in the second one's tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ...types import Array
from ..graph.ops import Ops

if TYPE_CHECKING:
    import onnx_ir as ir

# Measured in ONNX Runtime, 1 to 512 tokens, n 1000.
MAX_DENSE = 1024


def is_dense(shape: tuple[int, int]) -> bool:
    """Whether the dense form is the faster one for layers of this shape."""
    return max(shape) <= MAX_DENSE or any(min(factors(length)) < 8 for length in shape)


def factors(length: int) -> tuple[int, int]:
    """The factors a <= b of a length that are nearest to each other."""
    a = next(a for a in range(int(length**0.5), 0, -1) if length % a == 0)
    return a, length // a


def _angles(products: Array, length: int) -> Array:
    """Phases are reduced as integers: angles built in float32 would cost two digits."""
    angles: Array = (2 * np.pi / length) * (products % length).astype(np.float64)
    return angles


@lru_cache(maxsize=8)
def dense_table(length: int) -> Array:
    """[length, 2 (length // 2 + 1)]: cosines, then sines, of 2 pi f q / length, over length."""
    positions = np.arange(length, dtype=np.int64)
    angles = _angles(np.outer(positions, positions[: length // 2 + 1]), length)
    return (np.hstack([np.cos(angles), np.sin(angles)]) / length).astype(np.float32)


@lru_cache(maxsize=8)
def two_step_tables(length: int) -> tuple[Array, Array]:
    """Float32 tables of sum_q x_q exp(2 pi i v q / length) / length, in two steps.

    Returns:
        [2 a, 2 a] for the sums over q1 of complex numbers (real rows first: a real x needs the
        first half), and [a, 2 b, 2 b], per v1 the twiddle factors and the sums over q2.
    """
    a, b = factors(length)
    one, two = np.arange(a, dtype=np.int64), np.arange(b, dtype=np.int64)
    first = _complex_matrix(_angles(np.outer(one, one), a)) / length
    # v1 q2 + a v2 q2, as [v1, q2, v2]
    products = two[None, :, None] * (one[:, None, None] + a * two[None, None, :])
    return first.astype(np.float32), _complex_matrix(_angles(products, length)).astype(np.float32)


def _complex_matrix(angles: Array) -> Array:
    """exp(i angles) as a real matrix that rows (real, imaginary) are multiplied with."""
    cosine, sine = np.cos(angles), np.sin(angles)
    real, imaginary = (np.concatenate(pair, axis=-1) for pair in ((cosine, sine), (-sine, cosine)))
    return np.concatenate([real, imaginary], axis=-2)


class Transforms:
    """Writes transforms into one graph."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def dense_forward(self, x: ir.Value, length: int, name: str) -> Sequence[ir.Value]:
        """(..., N) to the cosine and the sine part, (..., N/2 + 1) each."""
        table = self.ops.constant(dense_table(length), f"fourier.forward.{length}")
        both = self.ops.op("MatMul", [x, table], f"{name}.transform")
        half = length // 2 + 1
        sizes = self.integers([half, half], f"halves{half}")
        return self.ops.ops("Split", [both, sizes], f"{name}.parts", 2, axis=-1)

    def dense_inverse(self, even: ir.Value, odd: ir.Value, length: int, name: str) -> ir.Value:
        """Both parts (..., M/2 + 1) to (..., M)."""
        both = self.ops.op("Concat", [even, odd], f"{name}.both", axis=-1)
        table = self.ops.constant(dense_table(length).T, f"fourier.inverse.{length}")
        return self.ops.op("MatMul", [both, table], f"{name}.delta")

    def two_step_forward(self, x: ir.Value, length: int, name: str) -> Sequence[ir.Value]:
        """Index q = q1 b + q2 to v = v1 + a v2; real in, both parts (tokens, N) out."""
        op, (a, b) = self.ops.op, factors(length)
        first, second = two_step_tables(length)
        x = self._reshape(x, [-1, a, b], f"{name}.split")
        x = op("Transpose", [x], f"{name}.turned", perm=[0, 2, 1])
        result = self._two_steps(x, length, first[:a], second, name)
        result = self._reshape(result, [a, -1, 2, b], f"{name}.complex")
        result = op("Transpose", [result], f"{name}.ordered", perm=[2, 1, 3, 0])
        result = self._reshape(result, [2, -1, length], f"{name}.transform")
        return [
            op("Gather", [result, self.integers(i, f"axis{i}")], f"{name}.{what}", axis=0)
            for i, what in enumerate(("cosine", "sine"))
        ]

    def two_step_inverse(self, even: ir.Value, odd: ir.Value, length: int, name: str) -> ir.Value:
        """Complex in, the real part out; tokens flattened."""
        op, (a, b) = self.ops.op, factors(length)
        first, second = two_step_tables(length)
        axis = self.integers([0], "first")
        parts = [op("Unsqueeze", [part, axis], f"{part.name}.part") for part in (even, odd)]
        bins = op("Concat", parts, f"{name}.both", axis=0)
        bins = self._reshape(bins, [2, -1, a, b], f"{name}.split")
        bins = op("Transpose", [bins], f"{name}.turned", perm=[1, 3, 0, 2])
        bins = self._reshape(bins, [-1, b, 2 * a], f"{name}.rows")
        result = self._two_steps(bins, length, first, second[:, :, :b], name)
        return op("Transpose", [result], f"{name}.delta", perm=[1, 2, 0])

    def _two_steps(
        self, x: ir.Value, length: int, first: Array, second: Array, name: str
    ) -> ir.Value:
        """(tokens, b, a or 2 a) to (a, tokens, 2 b or b)."""
        op, (a, b) = self.ops.op, factors(length)
        kind = f"{length}.{first.shape[0]}"
        x = op("MatMul", [x, self.ops.constant(first, f"fourier.first.{kind}")], f"{name}.first")
        x = self._reshape(x, [-1, b, 2, a], f"{name}.first_complex")
        x = op("Transpose", [x], f"{name}.first_turned", perm=[3, 0, 2, 1])
        x = self._reshape(x, [a, -1, 2 * b], f"{name}.first_rows")
        return op(
            "MatMul", [x, self.ops.constant(second, f"fourier.second.{kind}")], f"{name}.second"
        )

    def _reshape(self, value: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
        target = self.integers(shape, "shape." + "x".join(map(str, shape)))
        return self.ops.op("Reshape", [value, target], name)

    def integers(self, content: int | Sequence[int], name: str) -> ir.Value:
        """A constant of integers, made once for each content."""
        return self.ops.constant(np.array(content, dtype=np.int64), f"fourier.{name}")
