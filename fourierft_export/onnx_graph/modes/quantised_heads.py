"""Quantised heads that an adapter replaces: made float again, so that they can hold its tensors.

A head in float does not go into integers, and need not: the adapter has all of it. So the layer
becomes a plain MatMul with the dequantised weight, which is then replaced as in a float graph (and
stays as the base's own, where the adapter is an input).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import BaseMismatchError
from ...models.adapter_names_in_base import Bridge
from ..graph.ops import Ops, replace_uses
from ..graph.source import Source, constant_of
from ..locate.module_names import same_path
from ..locate.quantised import QuantisedLinear, after_qdq, only_user
from ..locate.weight_uses import modules_of

if TYPE_CHECKING:
    import onnx_ir as ir


def float_heads(
    source: Source, linears: Sequence[QuantisedLinear], saved: Iterable[str], bridge: Bridge
) -> list[QuantisedLinear]:
    """Make the quantised linear layers float whose weight is a saved tensor of an adapter.

    Of layers whose bias is one, the bias. What nothing uses afterwards is removed.

    Args:
        source: the graph, which is changed in place.
        linears: its quantised layers.
        saved: names of the adapters' saved tensors.
        bridge: from the adapter's paths to the graph's.

    Raises:
        BaseMismatchError: listing those whose form is not understood.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    names = {same_path(name): name for name in map(bridge.to_base, saved)}
    heads, biases = (
        {
            one: names[f"{path}.{kind}"]
            for one in linears
            for path in map(same_path, modules_of(one.node, one.weight))
            if f"{path}.{kind}" in names
        }
        for kind in ("weight", "bias")
    )
    ops, unknown = Ops(source.model.graph), []
    for one, name in biases.items():
        _float_bias(source, ops, one, name)
    for one, name in heads.items():
        if not _float_weight(ops, one, name):
            unknown.append(
                f"{name}: {one.weight} is quantised ({one.kind}) in a form that is not understood"
            )
    if unknown:
        raise BaseMismatchError(
            source.path,
            expected="heads in float, or plainly quantised",
            found=f"{len(unknown)} in a form that is not understood",
            remedy="quantise the base without these layers (nodes_to_exclude)",
            offenders=unknown,
        )
    if heads or biases:
        ops.finish()
        RemoveUnusedNodesPass()(source.model)
    return list(heads)


def _float_weight(ops: Ops, linear: QuantisedLinear, name: str) -> bool:
    """Give x W^T + b in place of a quantised layer; False if its form is not understood."""
    scale = None if linear.scale is None else _constant(linear.scale)
    x = linear.fed[0].inputs[linear.fed[1]]
    if linear.dequantised is None or scale is None or x is None:
        return False
    weight = linear.dequantised()[0].T.astype(scale.dtype.numpy())
    module, old = name.removesuffix(".weight"), linear.y
    users = tuple(old.uses())
    # Named as exporters name nodes, so that the module is found by it.
    y = ops.op("MatMul", [x, ops.initializer(weight, name)], f"/{module}/MatMul")
    bias = linear.node.inputs[2] if linear.node.op_type == "Gemm" else None
    if bias is not None:
        y = ops.op("Add", [y, bias], f"/{module}/Add")
    replace_uses(users, old, y)
    # Behind the bias, as behind the product, a range measured for the base's head would clip.
    add = only_user(y, "Add")
    after = y if add is None else after_qdq(add.outputs[0])
    if add is not None and after is not add.outputs[0]:
        replace_uses(tuple(after.uses()), after, add.outputs[0])
    return True


def _float_bias(source: Source, ops: Ops, linear: QuantisedLinear, name: str) -> None:
    """The layer's bias as a float constant, if it is a dequantised one."""
    node, index = linear.node, 2
    if node.op_type != "Gemm":
        add = only_user(linear.y, "Add")
        if add is None:
            return
        node, index = add, 1 - [v is linear.y for v in add.inputs].index(True)
    bias = node.inputs[index] if len(node.inputs) > index else None
    dequantise = bias.producer() if bias is not None else None
    if bias is None or dequantise is None or dequantise.op_type != "DequantizeLinear":
        return
    parts = [_constant((dequantise, i)) for i in range(len(dequantise.inputs))]
    if parts[0] is None or parts[1] is None:
        return
    values, scale = source.read(parts[0]).astype(np.float64), source.read(parts[1])
    zero = source.read(parts[2]).astype(np.float64) if len(parts) > 2 and parts[2] else 0.0
    content = ((values - zero) * scale.astype(np.float64)).astype(scale.dtype)
    old = str(bias.name)
    bias.name = ops.free(f"{old}.quantised")
    ops.release(old)
    node.replace_input_with(index, ops.initializer(content, name))


def _constant(place: tuple[ir.Node, int]) -> ir.TensorProtocol | None:
    value = place[0].inputs[place[1]]
    return None if value is None else constant_of(value)
