"""The cosine and sine transforms of a side branch, as operators of a graph.

Dense: one product with a table of both. Two-step, for lengths N = a b: two batched products, with
the twiddle factors in the second one's tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..graph.ops import Ops
from .tables import Float32, dense_table, factors, two_step_tables

if TYPE_CHECKING:
    import onnx_ir as ir


class Transforms:
    """Writes transforms into one graph.

    Args:
        ops: of the graph.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def dense_forward(self, x: ir.Value, length: int, name: str) -> Sequence[ir.Value]:
        """(..., N) to the cosine and the sine part, (..., N/2 + 1) each."""
        table = self.ops.constant(dense_table(length), f"fourier.forward.{length}")
        both = self.ops.op("MatMul", [x, table], f"{name}.transform")
        half = length // 2 + 1
        return self.ops.ops(
            "Split", [both, self._int([half, half], f"halves{half}")], f"{name}.parts", 2, axis=-1
        )

    def dense_inverse(self, even: ir.Value, odd: ir.Value, length: int, name: str) -> ir.Value:
        """Both parts (..., M/2 + 1) to (..., M)."""
        both = self.ops.op("Concat", [even, odd], f"{name}.both", axis=-1)
        table = self.ops.constant(dense_table(length).T, f"fourier.inverse.{length}")
        return self.ops.op("MatMul", [both, table], f"{name}.delta")

    def two_step_forward(self, x: ir.Value, length: int, name: str) -> Sequence[ir.Value]:
        """Index q = q1 b + q2 to v = v1 + a v2; real in, both parts (tokens, N) out."""
        a, b = factors(length)
        first, second = two_step_tables(length)
        x = self._reshape(x, [-1, a, b], f"{name}.split")
        x = self.ops.op("Transpose", [x], f"{name}.turned", perm=[0, 2, 1])
        result = self._two_steps(x, length, first[:a], second, name)
        result = self._reshape(result, [a, -1, 2, b], f"{name}.complex")
        result = self.ops.op("Transpose", [result], f"{name}.ordered", perm=[2, 1, 3, 0])
        result = self._reshape(result, [2, -1, length], f"{name}.transform")
        return [
            self.ops.op("Gather", [result, self._int(i, f"axis{i}")], f"{name}.{what}", axis=0)
            for i, what in enumerate(("cosine", "sine"))
        ]

    def two_step_inverse(self, even: ir.Value, odd: ir.Value, length: int, name: str) -> ir.Value:
        """Complex in, the real part out; tokens flattened."""
        a, b = factors(length)
        first, second = two_step_tables(length)
        axis = self._int([0], "first")
        bins = self.ops.op(
            "Concat",
            [self.ops.op("Unsqueeze", [part, axis], f"{part.name}.part") for part in (even, odd)],
            f"{name}.both",
            axis=0,
        )
        bins = self._reshape(bins, [2, -1, a, b], f"{name}.split")
        bins = self.ops.op("Transpose", [bins], f"{name}.turned", perm=[1, 3, 0, 2])
        bins = self._reshape(bins, [-1, b, 2 * a], f"{name}.rows")
        result = self._two_steps(bins, length, first, second[:, :, :b], name)
        return self.ops.op("Transpose", [result], f"{name}.delta", perm=[1, 2, 0])

    def _two_steps(
        self, x: ir.Value, length: int, first: Float32, second: Float32, name: str
    ) -> ir.Value:
        """(tokens, b, a or 2 a) to (a, tokens, 2 b or b)."""
        a, b = factors(length)
        kind = f"{length}.{first.shape[0]}"
        x = self.ops.op(
            "MatMul", [x, self.ops.constant(first, f"fourier.first.{kind}")], f"{name}.first"
        )
        x = self._reshape(x, [-1, b, 2, a], f"{name}.first_complex")
        x = self.ops.op("Transpose", [x], f"{name}.first_turned", perm=[3, 0, 2, 1])
        x = self._reshape(x, [a, -1, 2 * b], f"{name}.first_rows")
        table = self.ops.constant(second, f"fourier.second.{kind}")
        return self.ops.op("MatMul", [x, table], f"{name}.second")

    def _reshape(self, value: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
        target = self._int(shape, "shape." + "x".join(map(str, shape)))
        return self.ops.op("Reshape", [value, target], name)

    def _int(self, content: int | Sequence[int], name: str) -> ir.Value:
        return self.ops.constant(np.array(content, dtype=np.int64), f"fourier.{name}")
