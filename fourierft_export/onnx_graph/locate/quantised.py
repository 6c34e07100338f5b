"""Linear layers with quantised weights: MatMulNBits, QDQ and dynamic int8.

Their weights are not changed. An adapter is added between the layer's float input x and float
output y; the dequantised weight shows whether it is the layer that the adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...types import Array
from ..graph.source import STANDARD, Source, constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

Dequantised = Callable[[], tuple[Array, Array]]

# Quantised products that have no x and y in float, or whose integers are laid out otherwise.
_OTHERS = (
    "DynamicQuantizeMatMul",
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearMatMul",
)


@dataclass(frozen=True, eq=False)
class QuantisedLinear:
    """A linear layer with a quantised weight.

    Attributes:
        kind: "MatMulNBits", "QDQ" or "MatMulInteger".
        shape: (out, in).
        node: the MatMulNBits, MatMul, Gemm or MatMulInteger.
        value: the constant with its integers.
        integers: where that comes in: (node, index of the input).
        fed: where its input x (..., in) comes in, in float: (node, index of the input).
        y: its output (..., out), float, without bias (a Gemm's: with it).
        dequantised: gives W (out, in) float32 and the quantisation step of each element; None for
            a form that is not understood.
        scale: where the constant with the scales comes in, if there is one.
    """

    kind: str
    shape: tuple[int, int]
    node: ir.Node
    value: ir.Value
    integers: tuple[ir.Node, int]
    fed: tuple[ir.Node, int]
    y: ir.Value
    dequantised: Dequantised | None
    scale: tuple[ir.Node, int] | None = None

    @property
    def weight(self) -> str:
        """Name of the constant that holds the integers."""
        return str(self.value.name)


def find_quantised_linears(source: Source) -> list[QuantisedLinear]:
    """Every linear layer with a constant quantised weight in the main graph."""
    found = []
    for node in source.model.graph:
        if node.op_type == "MatMulNBits":
            one = _n_bits(source, node)
        elif node.op_type == "MatMulInteger" and node.domain in STANDARD:
            one = _integer(source, node)
        elif node.op_type in ("MatMul", "Gemm") and node.domain in STANDARD:
            one = _qdq(source, node)
        else:
            continue
        if one is not None:
            found.append(one)
    return found


def list_unsupported(source: Source) -> list[str]:
    """The quantised products to which no adapter can be added, and why, one line each."""
    graph, found = source.model.graph, set()
    for node in graph.all_nodes():
        if node.op_type in _OTHERS:
            found.add(f"{node.op_type}, whose quantised form is not understood")
        elif node.op_type in ("MatMulNBits", "MatMulInteger") and node.graph is not graph:
            found.add(f"{node.op_type} in a subgraph, which sees no adapter")
    return sorted(found)


def _n_bits(source: Source, node: ir.Node) -> QuantisedLinear | None:
    """com.microsoft MatMulNBits: B [N, blocks, bytes] uint8, scales per block of inputs."""
    value, packed = node.inputs[1], _constant(node, 1)
    if node.inputs[0] is None or value is None or packed is None:
        return None
    rows, columns, size = (int(node.attributes[n].as_int()) for n in ("N", "K", "block_size"))
    bits = int(node.attributes["bits"].as_int()) if "bits" in node.attributes else 4

    def dequantised() -> tuple[Array, Array]:
        blocks = -(-columns // size)
        values = _unpacked(source.read(packed), bits).reshape(rows, -1)[:, : blocks * size]
        scale = _read(source, node, 2).astype(np.float32).reshape(rows, blocks)
        zero = _read(source, node, 3, 2 ** (bits - 1))
        if zero.ndim:
            zero = _unpacked(zero, bits) if zero.dtype == np.uint8 else zero
            zero = np.repeat(zero.reshape(rows, -1)[:, :blocks], size, axis=1)
        weight, step = _scaled(values, np.repeat(scale, size, axis=1), zero)
        return weight[:, :columns], step[:, :columns]

    # Reordered columns (g_idx) are not supported.
    ordered = len(node.inputs) > 4 and node.inputs[4] is not None
    known = not ordered and bits in (4, 8) and _constants_only(node, 2, 3)
    return QuantisedLinear(
        "MatMulNBits",
        (rows, columns),
        node,
        value,
        (node, 1),
        (node, 0),
        node.outputs[0],
        dequantised if known else None,
        (node, 2),
    )


def _integer(source: Source, node: ir.Node) -> QuantisedLinear | None:
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul, weight (in, out)."""
    quantise = node.inputs[0].producer() if node.inputs[0] is not None else None
    value, tensor = node.inputs[1], _constant(node, 1)
    if value is None or quantise is None or quantise.op_type != "DynamicQuantizeLinear":
        return None
    if quantise.inputs[0] is None or tensor is None or len(tensor.shape) != 2:
        return None
    cast = only_user(node.outputs[0], "Cast")
    scaled = only_user(cast.outputs[0], "Mul") if cast is not None else None
    if cast is None or scaled is None:
        return None
    other = next(v for v in scaled.inputs if v is not cast.outputs[0])
    both = other.producer() if other is not None else None
    scales = [] if both is None else [i for i in range(len(both.inputs)) if _constant(both, i)]
    place = (both, scales[0]) if both is not None and len(scales) == 1 else None

    def dequantised() -> tuple[Array, Array]:
        scale = _read(source, *place) if place else np.zeros(())
        weight, step = _scaled(source.read(tensor), np.abs(scale), _read(source, node, 3, 0))
        return weight.T, step.T

    rows, columns = (int(size) for size in tensor.shape.numpy())
    return QuantisedLinear(
        "MatMulInteger",
        (columns, rows),
        node,
        value,
        (node, 1),
        (quantise, 0),
        scaled.outputs[0],
        dequantised if place else None,
        place,
    )


def _qdq(source: Source, node: ir.Node) -> QuantisedLinear | None:
    """MatMul or Gemm whose weight comes out of a DequantizeLinear, perhaps through a Transpose."""
    weight = node.inputs[1]
    producer = weight.producer() if weight is not None else None
    flipped = producer is not None and producer.op_type == "Transpose"
    if producer is not None and flipped and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if node.inputs[0] is None or producer is None or producer.op_type != "DequantizeLinear":
        return None
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if any(node.attributes[n].value != v for n, v in plain.items() if n in node.attributes):
        return None
    dequantise = producer
    value, tensor = dequantise.inputs[0], _constant(dequantise, 0)
    if value is None or tensor is None or len(tensor.shape) != 2:
        return None
    transposed = flipped == bool("transB" in node.attributes and node.attributes["transB"].as_int())
    axis, block = (
        int(dequantise.attributes[name].as_int()) if name in dequantise.attributes else default
        for name, default in (("axis", 1), ("block_size", 0))
    )

    def spread(values: Array, shape: tuple[int, ...]) -> Array:
        """Scales or zero points, broadcastable to the matrix."""
        if block:
            return np.repeat(values, block, axis=axis % 2)[: shape[0], : shape[1]]
        return values.reshape([-1, 1] if axis % 2 == 0 else [1, -1])

    def dequantised() -> tuple[Array, Array]:
        values, zero = source.read(tensor), _read(source, dequantise, 2, 0)
        scale = spread(_read(source, dequantise, 1), values.shape)
        zero = spread(zero, values.shape) if zero.ndim else zero
        weight, step = _scaled(values, scale, zero)
        return (weight.T, step.T) if transposed else (weight, step)

    first, second = (int(size) for size in tensor.shape.numpy())
    return QuantisedLinear(
        "QDQ",
        (second, first) if transposed else (first, second),
        node,
        value,
        (dequantise, 0),
        _before_qdq(node),
        after_qdq(node.outputs[0]),
        dequantised if _constants_only(dequantise, 1, 2) else None,
        (dequantise, 1),
    )


def _before_qdq(node: ir.Node) -> tuple[ir.Node, int]:
    """Where x comes in, before it is quantised and dequantised."""
    x = node.inputs[0]
    dequantise = x.producer() if x is not None else None
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return node, 0
    quantise = dequantise.inputs[0].producer() if dequantise.inputs[0] is not None else None
    found = quantise is not None and quantise.op_type == "QuantizeLinear"
    return (quantise, 0) if quantise is not None and found else (node, 0)


def after_qdq(y: ir.Value) -> ir.Value:
    """Y after its quantisation: the range measured for the base would clip the sum."""
    quantise = only_user(y, "QuantizeLinear")
    after = only_user(quantise.outputs[0], "DequantizeLinear") if quantise is not None else None
    return y if after is None else after.outputs[0]


def only_user(value: ir.Value, kind: str) -> ir.Node | None:
    """The one node that uses a value, if it is of this kind."""
    users = list(value.uses())
    return users[0][0] if len(users) == 1 and users[0][0].op_type == kind else None


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    return constant_of(node.inputs[index]) if len(node.inputs) > index else None


def _read(source: Source, node: ir.Node, index: int, default: int | None = None) -> Array:
    """A constant input's values; `default` where it is absent."""
    tensor = _constant(node, index)
    return np.array(default, np.float32) if tensor is None else source.read(tensor)


def _constants_only(node: ir.Node, needed: int, optional: int) -> bool:
    """Whether one input is a constant, and another one too, if it is there."""
    absent = len(node.inputs) <= optional or node.inputs[optional] is None
    return _constant(node, needed) is not None and (absent or _constant(node, optional) is not None)


def _scaled(values: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
    """Dequantised values in float32, and the quantisation step of each."""
    scale = scale.astype(np.float32)
    weight = (values.astype(np.float32) - zero.astype(np.float32)) * scale
    return weight, np.broadcast_to(np.abs(scale), weight.shape)


def _unpacked(packed: Array, bits: int) -> Array:
    """Unsigned integers out of bytes, the low ones first."""
    if bits == 8:
        return packed
    both = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)
