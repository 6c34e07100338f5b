"""The forms in which tools write quantised linear layers: MatMulNBits, QDQ and dynamic int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...types import Array
from ..graph.ops import STANDARD
from ..graph.source import Source, constant_of
from .consumers import paths_of
from .quantised import QuantisedLinear

if TYPE_CHECKING:
    import onnx_ir as ir


def quantised_linears(source: Source) -> list[QuantisedLinear]:
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


def others(source: Source) -> list[str]:
    """Kinds of quantised products beside which no adapter can be put, and why, one line each."""
    import onnx_ir as ir

    known: set[str] = set()
    inner: set[str] = set()
    for node in ir.traversal.RecursiveGraphIterator(source.model.graph):
        if node.op_type in _OTHERS:
            known.add(node.op_type)
        elif (
            node.op_type in ("MatMulNBits", "MatMulInteger")
            and node.graph is not source.model.graph
        ):
            inner.add(node.op_type)
    return [
        *(f"{kind}, whose quantised form is not understood" for kind in sorted(known)),
        *(f"{kind} in a subgraph, which sees no adapter" for kind in sorted(inner)),
    ]


def _n_bits(source: Source, node: ir.Node) -> QuantisedLinear | None:
    """com.microsoft MatMulNBits: B [N, blocks, bytes] uint8, scales per block of inputs."""
    x, weight = node.inputs[0], node.inputs[1]
    packed = constant_of(weight) if weight is not None else None
    if x is None or weight is None or packed is None:
        return None
    rows, columns = (int(node.attributes[name].as_int()) for name in ("N", "K"))
    bits = int(node.attributes["bits"].as_int()) if "bits" in node.attributes else 4
    size = int(node.attributes["block_size"].as_int())

    def dequantised() -> tuple[Array, Array]:
        blocks = -(-columns // size)
        values = unpacked(source.read(packed), bits).reshape(rows, -1)[:, : blocks * size]
        scales = _input(source, node, 2)
        zeros = _input(source, node, 3)
        if scales is None:
            raise ValueError("MatMulNBits without constant scales")
        scale = scales.astype(np.float32).reshape(rows, blocks)
        if zeros is None:
            zero = np.full((rows, blocks), 2 ** (bits - 1), np.float32)
        elif zeros.dtype == np.uint8:
            zero = unpacked(zeros, bits).reshape(rows, -1)[:, :blocks].astype(np.float32)
        else:
            zero = zeros.astype(np.float32).reshape(rows, blocks)
        step = np.repeat(np.abs(scale), size, axis=1)[:, :columns]
        centred = values.reshape(rows, blocks, size) - zero[:, :, None]
        weights = (centred * scale[:, :, None]).reshape(rows, -1)[:, :columns]
        return weights, step

    # Columns in another order (g_idx) are not taken apart here.
    ordered = len(node.inputs) > 4 and node.inputs[4] is not None
    known = not ordered and bits in (4, 8) and _is_constant(node, 2) and _is_constant(node, 3)
    name = str(weight.name)
    return QuantisedLinear(
        name,
        "MatMulNBits",
        (rows, columns),
        (node, 0),
        node.outputs[0],
        node,
        tuple(paths_of(node, name)),
        dequantised if known else None,
        (node, 1),
        (node, 2),
        (node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else None,
        block_size=size,
        bits=bits,
    )


def _integer(source: Source, node: ir.Node) -> QuantisedLinear | None:
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul, weight (in, out)."""
    quantise = node.inputs[0].producer() if node.inputs[0] is not None else None
    weight = node.inputs[1]
    tensor = constant_of(weight) if weight is not None else None
    if quantise is None or quantise.op_type != "DynamicQuantizeLinear":
        return None
    x = quantise.inputs[0]
    if x is None or weight is None or tensor is None or len(tensor.shape) != 2:
        return None
    cast = only_user(node.outputs[0], "Cast")
    scaled = only_user(cast.outputs[0], "Mul") if cast is not None else None
    if cast is None or scaled is None:
        return None
    other = next(v for v in scaled.inputs if v is not cast.outputs[0])
    both = other.producer() if other is not None else None
    factors = both.inputs if both is not None else ()
    scales = [i for i, value in enumerate(factors) if value is not None and constant_of(value)]

    def dequantised() -> tuple[Array, Array]:
        values = source.read(tensor).astype(np.float32)
        zero = _input(source, node, 3)
        scale = _input(source, both, scales[0]) if both is not None else None
        if scale is None:
            raise ValueError("MatMulInteger without a constant scale")
        scale = np.abs(scale.astype(np.float32))
        weights = (values - (0 if zero is None else zero.astype(np.float32))) * scale
        return weights.T, np.broadcast_to(scale, weights.shape).T

    rows, columns = (int(size) for size in tensor.shape.numpy())
    name = str(weight.name)
    return QuantisedLinear(
        name,
        "MatMulInteger",
        (columns, rows),
        (quantise, 0),
        scaled.outputs[0],
        node,
        tuple(paths_of(node, name)),
        dequantised if len(scales) == 1 else None,
        (node, 1),
        (both, scales[0]) if both is not None and len(scales) == 1 else None,
        (node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else None,
        transposed=True,
    )


def _qdq(source: Source, node: ir.Node) -> QuantisedLinear | None:
    """MatMul or Gemm whose weight comes out of a DequantizeLinear, perhaps through a Transpose."""
    x, weight = node.inputs[0], node.inputs[1]
    producer = weight.producer() if weight is not None else None
    turned = producer is not None and producer.op_type == "Transpose"
    if producer is not None and turned and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if x is None or producer is None or producer.op_type != "DequantizeLinear":
        return None
    if not _plain_product(node):
        return None
    integers = producer.inputs[0]
    tensor = constant_of(integers) if integers is not None else None
    if integers is None or tensor is None or len(tensor.shape) != 2:
        return None
    dequantise = producer
    by_rows = bool("transB" in node.attributes and node.attributes["transB"].as_int())
    transposed = by_rows == turned
    axis, block = (
        int(dequantise.attributes[name].as_int()) if name in dequantise.attributes else default
        for name, default in (("axis", 1), ("block_size", 0))
    )
    axis %= 2

    def dequantised() -> tuple[Array, Array]:
        values = source.read(tensor).astype(np.float32)
        scale, zero = _input(source, dequantise, 1), _input(source, dequantise, 2)
        if scale is None:
            raise ValueError("DequantizeLinear without a constant scale")
        scale = _spread(scale.astype(np.float32), values.shape, axis, block)
        offset = 0 if zero is None else _spread(zero.astype(np.float32), values.shape, axis, block)
        weights, step = (values - offset) * scale, np.broadcast_to(np.abs(scale), values.shape)
        return (weights.T, step.T) if transposed else (weights, step)

    first, second = (int(size) for size in tensor.shape.numpy())
    known = _is_constant(dequantise, 1) and _is_constant(dequantise, 2)
    name = str(integers.name)
    return QuantisedLinear(
        name,
        "QDQ",
        (second, first) if transposed else (first, second),
        _before_qdq(node),
        after_qdq(node.outputs[0]),
        node,
        tuple(paths_of(node, name)),
        dequantised if known else None,
        (dequantise, 0),
        (dequantise, 1),
        (dequantise, 2)
        if len(dequantise.inputs) > 2 and dequantise.inputs[2] is not None
        else None,
        transposed=transposed,
        axis=axis,
        block_size=block,
    )


def _spread(values: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Scales or zero points of a matrix, in a form that it can be multiplied with."""
    if block:
        repeated = np.repeat(values, block, axis=axis)
        return repeated[: shape[0], : shape[1]]
    return values.reshape([-1, 1] if axis == 0 else [1, -1])


def _plain_product(node: ir.Node) -> bool:
    """Whether a MatMul or Gemm is x W^T + b, without factors and with x as it is."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    found = node.attributes
    return all(found[name].value == value for name, value in plain.items() if name in found)


def _before_qdq(node: ir.Node) -> tuple[ir.Node, int]:
    """Where x comes in: before it is quantised and dequantised on its way to the node."""
    x = node.inputs[0]
    dequantise = x.producer() if x is not None else None
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return node, 0
    quantise = dequantise.inputs[0].producer() if dequantise.inputs[0] is not None else None
    found = quantise is not None and quantise.op_type == "QuantizeLinear"
    return (quantise, 0) if quantise is not None and found else (node, 0)


def after_qdq(y: ir.Value) -> ir.Value:
    """Y behind its quantisation: the range that was measured for the base would clip the sum."""
    quantise = only_user(y, "QuantizeLinear")
    after = only_user(quantise.outputs[0], "DequantizeLinear") if quantise is not None else None
    return y if after is None else after.outputs[0]


def only_user(value: ir.Value, kind: str) -> ir.Node | None:
    """The one node that uses a value, if it is of this kind."""
    users = list(value.uses())
    return users[0][0] if len(users) == 1 and users[0][0].op_type == kind else None


def _input(source: Source, node: ir.Node, index: int) -> Array | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = constant_of(value) if value is not None else None
    return None if tensor is None else source.read(tensor)


def _is_constant(node: ir.Node, index: int) -> bool:
    """Whether an input is absent or a constant."""
    value = node.inputs[index] if len(node.inputs) > index else None
    return value is None or constant_of(value) is not None


def unpacked(packed: Array, bits: int) -> Array:
    """Unsigned integers out of bytes, the low ones first."""
    if bits == 8:
        return packed
    both = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)
