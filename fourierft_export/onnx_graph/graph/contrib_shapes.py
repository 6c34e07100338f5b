"""Shapes behind operators of ONNX Runtime that its own symbolic inference does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Shape = list[Any]  # of sizes: numbers, or names
_INT32 = 6  # onnx.TensorProto.INT32


def contrib_operators(inference: Any) -> dict[str, Callable[[Any], None]]:
    """Operator -> a method that infers its outputs, for a SymbolicShapeInference's dispatcher."""
    own = _Operators(inference)
    return {
        "DynamicQuantizeMatMul": lambda node: own.multiply(node, 0, 1, dtype_of=2),
        "FusedGemm": lambda node: own.multiply(node, 0, 1),
        "FusedMatMul": lambda node: own.multiply(node, 0, 1),
        "MatMulBnb4": own.bnb4,
        "MatMulIntegerToFloat": lambda node: own.multiply(node, 0, 1, dtype_of=2),
        "QAttention": own.attention,
        "QEmbedLayerNormalization": own.embedding,
        "QGemm": lambda node: own.multiply(node, 0, 3, dtype_of=8 if _has(node, 8) else 1),
        "QLinearConcat": own.concat,
        "QLinearSigmoid": lambda node: own.set(node, own.shape(node, 0)),
        "TransposeMatMul": lambda node: own.multiply(node, 0, 1),
    }


def _has(node: Any, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])


def _attribute(node: Any, name: str, default: Any) -> Any:
    import onnx

    found = [one for one in node.attribute if one.name == name]
    return onnx.helper.get_attribute_value(found[0]) if found else default


class _Operators:
    """Infers the outputs of nodes, and tells an inference of them."""

    def __init__(self, inference: Any) -> None:
        self.inference = inference

    def shape(self, node: Any, index: int) -> Shape:
        """The shape of an input."""
        shape: Shape = self.inference._get_shape(node, index)
        return list(shape)

    def set(
        self, node: Any, shape: Shape, *, dtype_of: int = 0, output: int = 0, dtype: int = 0
    ) -> None:
        """Set the shape of an output, and its dtype: `dtype`, or else that of an input."""
        import onnx

        known = self.inference.known_vi_
        name = node.output[output] if len(node.output) > output else ""
        if name:
            dtype = dtype or known[node.input[dtype_of]].type.tensor_type.elem_type
            known[name].CopyFrom(onnx.helper.make_tensor_value_info(name, dtype, shape))

    def multiply(self, node: Any, a: int, b: int, *, dtype_of: int = 0) -> None:
        """Infer the product of two inputs, either perhaps transposed."""
        if _attribute(node, "transBatchA", 0) or _attribute(node, "transBatchB", 0):
            raise ValueError(f"{node.name} transposes batches")
        left, right = self.shape(node, a), self.shape(node, b)
        if _attribute(node, "transA", 0):
            left[-2:] = left[-2:][::-1]
        if _attribute(node, "transB", 0):
            right[-2:] = right[-2:][::-1]
        if len(left) < 2 or len(right) < 2:
            raise ValueError(f"{node.name} multiplies vectors")
        leading = self.inference._broadcast_shapes(left[:-2], right[:-2])
        self.set(node, [*leading, left[-2], right[-1]], dtype_of=dtype_of)

    def bnb4(self, node: Any) -> None:
        """Infer x B^T of a packed matrix (N, K)."""
        name = "N" if _attribute(node, "transB", 1) else "K"
        self.set(node, [*self.shape(node, 0)[:-1], _attribute(node, name, None)])

    def attention(self, node: Any) -> None:
        """Infer QAttention of x (batch, sequence, hidden) with weights (hidden, 3 out)."""
        batch, sequence, _ = self.shape(node, 0)
        width, heads = self.shape(node, 1)[1] // 3, _attribute(node, "num_heads", 1)
        self.set(node, [batch, sequence, width], dtype_of=3)
        total = None if _has(node, 8) else sequence
        self.set(node, [2, batch, heads, total, width // heads], dtype_of=3, output=1)

    def embedding(self, node: Any) -> None:
        """Infer QEmbedLayerNormalization of ids (batch, sequence) and a table (words, hidden)."""
        ids, table = self.shape(node, 0), self.shape(node, 2)
        self.set(node, [*ids, table[1]], dtype_of=8)
        self.set(node, ids[:1], output=1, dtype=_INT32)

    def concat(self, node: Any) -> None:
        """Infer QLinearConcat of inputs 2, 5, 8, ...; between them are scales and zero points."""
        parts = [self.shape(node, index) for index in range(2, len(node.input), 3)]
        shape, axis = parts[0], _attribute(node, "axis", 0)
        sizes = [part[axis] for part in parts]
        shape[axis] = sum(sizes) if all(isinstance(size, int) for size in sizes) else None
        self.set(node, shape, dtype_of=1)
