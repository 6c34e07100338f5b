"""Linear layers with quantised weights: MatMulNBits, QDQ, dynamic int8, and integers times a scale.

Their weights are not changed. An adapter is added between the layer's float input x and float
output y; the dequantised weight shows whether it is the layer that the adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ...errors import BadInputError, first_line
from ...types import Array
from ..graph.source import STANDARD, Source, constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

Place = tuple["ir.Node", int]  # a node, and the index of one of its inputs
# Gives W (out, in) float32, and the quantisation step of each element.
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
        kind: how the weight is quantised, for messages.
        shape: (out, in).
        node: the MatMulNBits, MatMul, Gemm or MatMulInteger.
        value: the constant with the integers.
        integers: where that comes in.
        fed: where its input x (..., in) comes in, in float.
        y: its output (..., out), float, without bias (a Gemm's: with it).
        dequantised: None for a form that is not understood.
        scale: where the constant with the scales comes in, if there is one.
    """

    kind: str
    shape: tuple[int, int]
    node: ir.Node
    value: ir.Value
    integers: Place
    fed: Place
    y: ir.Value
    dequantised: Dequantised | None
    scale: Place | None = None

    @property
    def weight(self) -> str:
        """Name of the constant that holds the integers."""
        return str(self.value.name)


def find_quantised_linears(source: Source) -> list[QuantisedLinear]:
    """Every linear layer with a constant quantised weight in the main graph."""
    found = []
    for node in source.model.graph:
        if node.op_type == "MatMulNBits":
            found.append(_n_bits(source, node))
        elif node.op_type == "MatMulInteger" and node.domain in STANDARD:
            found.append(_integer(source, node))
        elif node.op_type in ("MatMul", "Gemm") and node.domain in STANDARD:
            found.append(_dequantised_product(source, node))
    return [_check_parts(source, one) for one in found if one is not None]


def _check_parts(source: Source, linear: QuantisedLinear) -> QuantisedLinear:
    """The same layer, whose weight is bad input where scales or zero points do not fit it."""
    dequantise = linear.dequantised
    if dequantise is None:
        return linear

    def dequantised() -> tuple[Array, Array]:
        try:
            return dequantise()
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            raise BadInputError(
                source.path,
                expected=f"scales and zero points that fit the quantised weight {linear.weight!r}",
                found=first_line(error),
                remedy="quantise the model again",
            ) from None

    return replace(linear, dequantised=dequantised)


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
        values = _unpacked(source.read(packed), bits).reshape(rows, blocks * size)
        scale = _read(source, node, 2).astype(np.float32).reshape(rows, blocks)
        zero = _read(source, node, 3, 2 ** (bits - 1))
        if zero.ndim:
            zero = _unpacked(zero, bits) if zero.dtype == np.uint8 else zero
            zero = np.repeat(zero.reshape(rows, -1)[:, :blocks], size, axis=1)
        weight, step = _scaled(values, np.repeat(scale, size, axis=1), zero)
        return weight[:, :columns], step[:, :columns]

    # Reordered columns (g_idx) are not supported.
    ordered = len(node.inputs) > 4 and node.inputs[4] is not None
    known = dequantised if not ordered and bits in (4, 8) and _constants_only(node, 2, 3) else None
    y, shape = node.outputs[0], (rows, columns)
    places = (node, 1), (node, 0), y, known, (node, 2)
    return QuantisedLinear("MatMulNBits", shape, node, value, *places)


def _integer(source: Source, node: ir.Node) -> QuantisedLinear | None:
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul, weight (in, out)."""
    quantise, tensor = _producer(node, 0, "DynamicQuantizeLinear"), _constant(node, 1)
    cast = only_user(node.outputs[0], "Cast")
    scaled = only_user(cast.outputs[0], "Mul") if cast is not None else None
    if quantise is None or quantise.inputs[0] is None or tensor is None or len(tensor.shape) != 2:
        return None
    if cast is None or scaled is None or node.inputs[1] is None:
        return None
    both = _producer(scaled, 1 if scaled.inputs[0] is cast.outputs[0] else 0)
    scales = [] if both is None else [i for i in range(len(both.inputs)) if _constant(both, i)]
    place = (both, scales[0]) if both is not None and len(scales) == 1 else None

    def dequantised() -> tuple[Array, Array]:
        scale = _read(source, *place) if place else np.zeros(())
        weight, step = _scaled(source.read(tensor), np.abs(scale), _read(source, node, 3, 0))
        return weight.T, step.T

    rows, columns = (int(size) for size in tensor.shape.numpy())
    known = dequantised if place else None
    places = (node, 1), (quantise, 0), scaled.outputs[0], known, place
    return QuantisedLinear("MatMulInteger", (columns, rows), node, node.inputs[1], *places)


def _dequantised_product(source: Source, node: ir.Node) -> QuantisedLinear | None:
    """MatMul or Gemm whose weight is dequantised in the graph, perhaps behind a Transpose."""
    producer = _producer(node, 1)
    flipped = producer is not None and producer.op_type == "Transpose"
    producer = _producer(producer, 0) if producer is not None and flipped else producer
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if any(node.attributes[n].value != v for n, v in plain.items() if n in node.attributes):
        return None
    if node.inputs[0] is None or producer is None:
        return None
    is_qdq = producer.op_type == "DequantizeLinear"
    parts = ((producer, 0), (producer, 1), (producer, 2)) if is_qdq else _scaled_parts(producer)
    value = parts[0][0].inputs[parts[0][1]] if parts else None
    tensor = constant_of(value)
    if parts is None or value is None or tensor is None or len(tensor.shape) != 2:
        return None
    integers, scale_at, zero_at = parts
    transposed = flipped == bool("transB" in node.attributes and node.attributes["transB"].as_int())
    axis, block = (
        int(producer.attributes[name].as_int()) if name in producer.attributes else default
        for name, default in (("axis", 1), ("block_size", 0))
    )

    def spread(values: Array, shape: tuple[int, ...]) -> Array:
        """Scales or zero points, broadcastable to the matrix."""
        if not values.ndim or not is_qdq:
            return values
        if block:
            return np.repeat(values, block, axis=axis % 2)[: shape[0], : shape[1]]
        return values.reshape([-1, 1] if axis % 2 == 0 else [1, -1])

    def dequantised() -> tuple[Array, Array]:
        values = source.read(tensor)
        zero = _read(source, *zero_at, 0) if zero_at else np.zeros((), np.float32)
        scale = _read(source, *scale_at)
        weight, step = _scaled(values, spread(scale, values.shape), spread(zero, values.shape))
        return (weight.T, step.T) if transposed else (weight, step)

    first, second = (int(size) for size in tensor.shape.numpy())
    return QuantisedLinear(
        "QDQ" if is_qdq else "integers times a scale",
        (second, first) if transposed else (first, second),
        node,
        value,
        integers,
        _before_qdq(node),
        after_qdq(node.outputs[0]),
        dequantised if not is_qdq or _constants_only(producer, 1, 2) else None,
        scale_at,
    )


def _scaled_parts(mul: ir.Node) -> tuple[Place, Place, Place | None] | None:
    """Integers, scale and zero point of (Cast(integers) - zero point) * scale, all constants."""
    scales = [i for i in range(len(mul.inputs)) if _constant(mul, i)]
    if mul.op_type != "Mul" or len(scales) != 1:
        return None
    cast, zero = _producer(mul, 1 - scales[0]), None
    if cast is not None and cast.op_type == "Sub":
        zero = _cast_constant(cast, 1)
        cast = None if zero is None else _producer(cast, 0)
    integers = None if cast is None or cast.op_type != "Cast" else _cast_constant(cast, 0)
    tensor, scale = _constant(*integers) if integers else None, _constant(mul, scales[0])
    if integers is None or tensor is None or scale is None or "INT" not in tensor.dtype.name:
        return None
    # A scale of more sizes than the integers would spread the matrix.
    sizes = zip(scale.shape.numpy()[::-1], tensor.shape.numpy()[::-1], strict=False)
    fits = len(scale.shape) <= len(tensor.shape) and all(a in (1, b) for a, b in sizes)
    return (integers, (mul, scales[0]), zero) if fits else None


def _cast_constant(node: ir.Node, index: int) -> Place | None:
    """Where a constant comes in, at this input or at that of a Cast before it."""
    cast = _producer(node, index, "Cast")
    place = (node, index) if cast is None else (cast, 0)
    return place if _constant(*place) is not None else None


def _before_qdq(node: ir.Node) -> Place:
    """Where x comes in, before it is quantised and dequantised."""
    dequantise = _producer(node, 0, "DequantizeLinear")
    quantise = None if dequantise is None else _producer(dequantise, 0, "QuantizeLinear")
    return (node, 0) if quantise is None else (quantise, 0)


def _producer(node: ir.Node, index: int, kind: str | None = None) -> ir.Node | None:
    """The node that gives an input, if it is of this kind."""
    value = node.inputs[index] if len(node.inputs) > index else None
    producer = value.producer() if value is not None else None
    return producer if producer is not None and kind in (None, producer.op_type) else None


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
