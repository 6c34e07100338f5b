"""ONNX Runtime's operators as standard ones of the same output shape and type, for inference.

Signatures: ContribOperators.md of ONNX Runtime. What a stand-in computes is nothing of use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .source import constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"
FLOAT = 1
# The shape and type of the first input.
_SAME = re.compile(
    "BiasAdd|BiasDropout|BiasGelu|BiasSoftmax|DecoderMaskedMultiHeadAttention|FastGelu|Gelu|"
    "GemmaRotaryEmbedding|GroupNorm|Inverse|QLinearLeakyRelu|QLinearSigmoid|QLinearSoftmax|"
    "QuickGelu|RotaryEmbedding|SimplifiedLayerNormalization|SkipGroupNorm|SkipLayerNormalization|"
    "SkipSimplifiedLayerNormalization"
)
# Of these, ONNX Runtime's kernels are in the standard domain.
_IN_STANDARD = frozenset(["SimplifiedLayerNormalization"])
# Their fourth output, the sum before the norm, is like the first.
_WITH_SUM = frozenset(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])


class _Stage:
    """Nodes for one operator's place in the graph."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a new node before the operator."""
        import onnx_ir as ir

        new = ir.node(kind, inputs, attributes)
        self.graph.insert_before(self.node, new)
        return new.outputs[0]

    def weight(self, like: ir.Value, *shape: int) -> ir.Value:
        """A value of this shape, and the type of another."""
        import onnx_ir as ir

        name = f"fourierft.standin.{len(self.graph.inputs)}"
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.inputs.append(value)
        return self.op("CastLike", value, like)

    def inputs(self, *at: int) -> list[ir.Value]:
        """Some of the operator's inputs.

        Raises:
            LookupError: one is absent.
        """
        there = self.node.inputs
        found = [there[i] for i in at if i < len(there)]
        values = [value for value in found if value is not None]
        if len(values) < len(at):
            raise LookupError(f"{self.node.op_type} without all of its inputs")
        return values

    def sizes(self, at: int) -> list[int]:
        """The shape of a constant, or of what is told of.

        Raises:
            LookupError: it is not known.
        """
        (value,) = self.inputs(at)
        tensor = constant_of(value)
        shape = value.shape if tensor is None else tensor.shape
        sizes = [size for size in shape or () if isinstance(size, int)]
        if shape is None or len(sizes) != len(shape):
            raise LookupError(f"{self.node.op_type} on {value.name}")
        return sizes

    def number(self, name: str, default: int = 0) -> int:
        """An attribute that is an integer."""
        there = self.node.attributes
        return int(there[name].as_int()) if name in there else default


def put_standins(model: ir.Model) -> None:
    """Replace the operators of ONNX Runtime's that are known here; others stay.

    Args:
        model: changed in place, of opset 15 or newer; it is nothing to run any more.
    """
    graph = model.graph
    for node in tuple(graph):
        kind = node.op_type
        if _SAME.fullmatch(kind) and (node.domain == CONTRIB or kind in _IN_STANDARD):
            make: Callable[[_Stage], ir.Value] | None = _same
        else:
            make = _MAKERS.get(kind) if node.domain == CONTRIB else None
        if make is None:
            continue
        try:
            _hand_over(graph, node.outputs[0], make(_Stage(graph, node)))
            if kind in _WITH_SUM and len(node.outputs) > 3:
                _hand_over(graph, node.outputs[3], _same(_Stage(graph, node)))
        except (LookupError, TypeError):
            continue  # not as its signature says: its output stays unknown


def _hand_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Give a value's name, users and what is told of it to another."""
    new.shape, new.type = old.shape, old.type
    name = old.name
    old.name, new.name = f"{name}.fourierft.replaced", name
    for user, index in tuple(old.uses()):
        user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def _same(stage: _Stage) -> ir.Value:
    return stage.op("Identity", *stage.inputs(0))


def _n_bits(stage: _Stage) -> ir.Value:
    """A [..., K], quantised B [N, K]."""
    (a,) = stage.inputs(0)
    return stage.op("MatMul", a, stage.weight(a, stage.number("K"), stage.number("N")))


def _dynamic(stage: _Stage) -> ir.Value:
    """A float, B [K, N] integers."""
    a, b = stage.inputs(0, 1)
    return stage.op("MatMul", a, stage.op("CastLike", b, a))


def _to_float(stage: _Stage) -> ir.Value:
    """A, B integers, scale of A float."""
    a, b, scale = stage.inputs(0, 1, 2)
    return stage.op("CastLike", stage.op("MatMulInteger", a, b), scale)


def _fused(stage: _Stage) -> ir.Value:
    """A, B, each perhaps turned in its last two dimensions."""
    if stage.number("transBatchA") or stage.number("transBatchB"):
        raise LookupError("turned batches")
    a, b = stage.inputs(0, 1)
    factors = [
        _turned(stage, value) if stage.number(flag) else value
        for value, flag in ((a, "transA"), (b, "transB"))
    ]
    return stage.op("MatMul", *factors)


def _turned(stage: _Stage, value: ir.Value) -> ir.Value:
    tensor = constant_of(value)
    shape = value.shape if tensor is None else tensor.shape
    if shape is None:
        raise LookupError(f"{value.name} of unknown rank")
    order = list(range(len(shape)))
    return stage.op("Transpose", value, perm=[*order[:-2], order[-1], order[-2]])


def _gemm(stage: _Stage) -> ir.Value:
    flags = {name: stage.number(name) for name in ("transA", "transB")}
    return stage.op("Gemm", *stage.inputs(0, 1), **flags)


def _quantised_gemm(stage: _Stage) -> ir.Value:
    """A, its scale and zero point, B, ..., scale and zero point of Y unless Y is float."""
    a, scale, b = stage.inputs(0, 1, 3)
    flags = {name: stage.number(name) for name in ("transA", "transB")}
    a, b = (stage.op("CastLike", value, scale) for value in (a, b))
    product = stage.op("Gemm", a, b, **flags)
    zero = stage.node.inputs[8] if len(stage.node.inputs) > 8 else None
    return product if zero is None else stage.op("CastLike", product, zero)


def _elementwise(stage: _Stage) -> ir.Value:
    """A, its scale and zero point, B, ...: of the two shapes together."""
    a, b = stage.inputs(0, 3)
    return stage.op("Add", a, b)


def _concat(stage: _Stage) -> ir.Value:
    """Scale and zero point of Y, then each part with its own."""
    parts = stage.inputs(*range(2, len(stage.node.inputs), 3))
    return stage.op("Concat", *parts, axis=stage.number("axis"))


def _embedding(stage: _Stage) -> ir.Value:
    """Ids [B, S], segments, table of words [V, H]: [B, S, H]; float, if the table is quantised."""
    ids, words = stage.inputs(0, 2)
    rows = stage.op("Gather", words, ids, axis=0)
    return stage.op("Cast", rows, to=FLOAT) if stage.node.op_type.startswith("Q") else rows


def _attention(stage: _Stage) -> ir.Value:
    """X [B, S, D], weights [D, 3H]: [B, S, H], with sizes of q, k and v if they differ."""
    (x,) = stage.inputs(0)
    sizes = stage.sizes(1)
    told = stage.node.attributes.get("qkv_hidden_sizes")
    wide = sizes[-1] // 3 if told is None else int(told.as_ints()[2])
    if stage.node.op_type.startswith("Q"):
        x = stage.op("Cast", x, to=FLOAT)
    return stage.op("MatMul", x, stage.weight(x, sizes[0], wide))


def _heads(stage: _Stage) -> ir.Value:
    """Query [B, S, D] and value [B, L, H] (key between): [B, S, H]."""
    query, value = stage.inputs(0, 2)
    return stage.op("Einsum", query, value, equation="bsd,blh->bsh")


def _grouped(stage: _Stage) -> ir.Value:
    """Query [B, S, D] with key and value of their own; or packed, which is left alone."""
    query, _, _ = stage.inputs(0, 1, 2)
    return stage.op("Identity", query)


_MAKERS: dict[str, Callable[[_Stage], ir.Value]] = {
    "Attention": _attention,
    "DynamicQuantizeMatMul": _dynamic,
    "EmbedLayerNormalization": _embedding,
    "FusedGemm": _gemm,
    "FusedMatMul": _fused,
    "FusedMatMulActivation": _fused,
    "GroupQueryAttention": _grouped,
    "MatMulBnb4": _n_bits,
    "MatMulIntegerToFloat": _to_float,
    "MatMulNBits": _n_bits,
    "MultiHeadAttention": _heads,
    "QAttention": _attention,
    "QEmbedLayerNormalization": _embedding,
    "QGemm": _quantised_gemm,
    "QLinearAdd": _elementwise,
    "QLinearConcat": _concat,
    "QLinearMul": _elementwise,
    "TransposeMatMul": _fused,
}
