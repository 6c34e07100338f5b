"""Which values of a graph hold the rows of the batch one after the other.

Either a value's first dimension is the batch itself, or it is the batch times others, flattened out
of such a value. Sizes alone do not show the latter: tokens times batch is as large as batch times
tokens. So the graph is followed back, through operators that leave the order of rows alone, to a
value whose first dimension is the batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UsageError
from ..graph.source import STANDARD, constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

UNNAMED = "fourierft.batch"
_KNOWN = (*STANDARD, "com.microsoft")
# Same order of elements, other sizes.
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
# Row by row, from the first input.
_UNARY = re.compile(
    "Abs|Cast|Clip|Cos|DequantizeLinear|Dropout|DynamicQuantizeLinear|Elu|Erf|Exp|FastGelu|Gelu|"
    "HardSigmoid|HardSwish|Identity|LayerNormalization|LeakyRelu|Log|MatMulNBits|Mish|Neg|Not|"
    "QuantizeLinear|QuickGelu|Reciprocal|Relu|Selu|Sigmoid|SimplifiedLayerNormalization|"
    "SkipLayerNormalization|Softplus|Softsign|Sqrt|Tanh"
)
# Row by row, from several inputs.
_SEVERAL = re.compile(
    "Add|And|BiasGelu|Div|Equal|Greater(OrEqual)?|Less(OrEqual)?|Max|Mean|Min|Mul|Or|Pow|PRelu|Sub|"
    "Sum|Where"
)


def batch_of(model: ir.Model) -> int | str:
    """The first dimension of the graph's first input; it gets a name if it has none."""
    import onnx_ir as ir

    shape = model.graph.inputs[0].shape if model.graph.inputs else None
    if shape is None or not len(shape):
        raise UsageError("bank", expected="a batch as the first dimension of the first input")
    size = shape[0]
    if isinstance(size, int):
        return size
    if size.value is None:
        model.graph.inputs[0].shape = ir.Shape([UNNAMED, *shape[1:]])
        return UNNAMED
    return str(size.value)


def is_batch_first(value: ir.Value, batch: int | str) -> bool:
    """Whether a value's first dimension is the batch and nothing else.

    A batch of fixed size must be the size of one dimension only: of two equal ones, either may be
    the batch. (The last one holds features.)
    """
    shape = value.shape
    if shape is None or not len(shape) or not _same(shape[0], batch):
        return False
    return batch == 1 or not any(_same(size, batch) for size in shape[1:-1])


def leads_with_batch(value: ir.Value, batch: int | str) -> bool:
    """Whether a value's first dimension is the batch, or the batch times others in that order."""
    known: dict[ir.Value, bool] = {}
    # Depth first without recursion: graphs are deeper than Python's stack.
    stack = [value]
    while stack:
        one = stack[-1]
        if one in known:
            stack.pop()
        elif is_batch_first(one, batch):
            known[one] = True
        else:
            sources = list(_sources(one, batch))
            open_ones = [source for source in sources if source not in known]
            if open_ones:
                stack += open_ones
            else:
                known[one] = bool(sources) and all(known[source] for source in sources)
    return known[value]


def _sources(value: ir.Value, batch: int | str) -> Iterator[ir.Value]:
    """The values whose order of rows is this one's; none if no such order is known."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return
    ids = node.inputs[1] if node.op_type == "Gather" else None
    if ids is not None:  # rows of a table, in the order of the ids
        table = constant_of(node.inputs[0])
        if node.domain in STANDARD and not _attribute(node, "axis", 0) and table is not None:
            yield ids
        return
    if _SEVERAL.fullmatch(node.op_type) and node.domain in _KNOWN:
        rank = _rank(value)
        yield from (one for one in node.inputs if one is not None and not _repeated(one, rank))
    elif node.domain in _KNOWN and _keeps_rows(node, value, batch):
        yield node.inputs[0]


def _repeated(value: ir.Value, rank: int | None) -> bool:
    """Whether an input is the same for every row of a result of this rank."""
    own, shape = _rank(value), value.shape
    lower = own is not None and rank is not None and own < rank
    return lower or constant_of(value) is not None or bool(shape and shape[0] == 1)


def _keeps_rows(node: ir.Node, value: ir.Value, batch: int | str) -> bool:
    """Whether the output's rows are in the order of the first input's."""
    kind, shape = node.op_type, value.shape
    if kind in _RESHAPING:
        # A known first size that the batch does not divide would split its rows.
        size = shape[0] if shape is not None and len(shape) else None
        return not isinstance(batch, int) or not isinstance(size, int) or size % batch == 0
    if _UNARY.fullmatch(kind) or (kind == "MatMulInteger" and node.domain in STANDARD):
        return value is node.outputs[0]
    if node.domain not in STANDARD:
        return False
    if kind == "Gemm":
        return not _attribute(node, "transA", 0)
    if kind == "MatMul":
        # A factor of higher rank would add dimensions in front.
        a, b = (None if one is None else _rank(one) for one in node.inputs)
        return b == 2 or (a is not None and b is not None and b <= a)
    if kind == "Expand":
        ranks = [_rank(one) for one in (value, node.inputs[0]) if one is not None]
        return ranks[0] is not None and ranks[0] == ranks[-1]
    if kind == "Transpose":
        order = _attribute(node, "perm", None)
        return order is not None and int(order[0]) == 0
    if kind in ("Softmax", "LogSoftmax", "Split"):
        axis = int(_attribute(node, "axis", 0 if kind == "Split" else -1))
        return axis == -1 or axis > 0
    if kind == "ReduceMean":
        held = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = _attribute(node, "axes", None) if held is None else held.numpy()
        return axes is not None and bool((np.asarray(axes) == -1).all())
    return False


def _same(size: Any, batch: int | str) -> bool:
    return bool(size == batch) if isinstance(batch, int) else str(size) == batch


def _rank(value: ir.Value) -> int | None:
    tensor = constant_of(value)
    if tensor is not None:
        return len(tensor.shape)
    return None if value.shape is None else len(value.shape)


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default
