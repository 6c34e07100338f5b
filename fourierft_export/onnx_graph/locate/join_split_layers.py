"""Joins products that are the parts of one layer: q, k and v in the graph, qkv in the adapter.

onnxruntime-genai takes the packed layers of Phi-3 apart. The parts become one product again, whose
outputs are split, so that the layer has one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UsageError
from ...types import Array
from ..graph.ops import Ops, replace_uses
from ..graph.source import STANDARD, Source, constant_of, constant_shape
from .finder import Finder
from .module_names import packed_modules, same_path
from .site import Site, Wanted

if TYPE_CHECKING:
    import onnx_ir as ir

_SPLIT_OPSET = 13  # the first whose Split takes its sizes as an input


def join_parts(finder: Finder, wanted: Sequence[Wanted], mapping: Mapping[str, str]) -> list[str]:
    """Join the parts of layers that the graph has taken apart; return the layers' names.

    Args:
        finder: of the graph, which is changed: make a new one if a layer was joined.
        wanted: the layers to find.
        mapping: layer -> constant (not for this function), or the constants of its parts in order,
            as `first+second+third`.
    """
    source, bridge = finder.source, finder.bridge(want.name for want in wanted)
    joined = []
    for want in wanted:
        path = same_path(bridge.to_base(want.name))
        named = mapping.get(want.name)
        if named is None:
            names = [] if finder.has(path) else packed_modules(path)
            parts = [finder.parts_at(name) for name in names]
        else:
            names = named.split("+") if not finder.constants_named(named) else []
            parts = [finder.constants_named(name) for name in names]
        if len(names) < 2 or (named is None and not all(parts)):
            continue
        why = _obstacle(source, names, parts)
        if why is None:
            _join(source, [part for (part,) in parts], path)
            joined.append(want.name)
        elif named is not None:
            raise UsageError("mapping", expected=f"the parts of {want.name}", found=why)
    return joined


def _obstacle(source: Source, names: Sequence[str], parts: Sequence[Sequence[Site]]) -> str | None:
    """Why these constants are not the weights of products of one x, each of its own."""
    for name, sites in zip(names, parts, strict=True):
        if len(sites) != 1 or len(sites[0].uses) != 1:
            return f"{name}, which is not the weight of one product"
        use, node = sites[0].uses[0], sites[0].uses[0].linear
        if node.op_type == "MatMul":
            suits = node.domain in STANDARD and use.node is node and use.index == 1
        else:
            suits = node.op_type == "MatMulNBits" and all(one is None for one in node.inputs[4:])
        if not suits or node.graph is not source.model.graph:
            return f"{name}, which is used by {node.op_type} in another way"
    nodes = [sites[0].uses[0].linear for sites in parts]
    kinds = {
        (
            node.op_type,
            node.inputs[0],
            len(node.inputs),
            *(str(a.value) for n, a in sorted(node.attributes.items()) if n != "N"),
            *(getattr(constant_of(value), "dtype", None) for value in node.inputs[1:]),
        )
        for node in nodes
    }
    if len(kinds) > 1:
        return f"{' and '.join(names)}, whose inputs or forms differ"
    return None if source.opset >= _SPLIT_OPSET else f"a graph of opset {source.opset}"


def _join(source: Source, parts: Sequence[Site], path: str) -> None:
    """Make one product of the parts' products, and split what it gives."""
    import onnx_ir as ir

    ops = Ops(source.model.graph)
    nodes = [part.uses[0].linear for part in parts]
    first, name = nodes[0], f"/{path.replace('.', '/')}/{nodes[0].op_type}"
    inputs: list[ir.Value] = [value for value in first.inputs[:1] if value is not None]
    for index in range(1, len(first.inputs)):
        ending = ("weight", "scales", "zeros")[index - 1]
        held = [value for node in nodes if (value := node.inputs[index]) is not None]
        axis = 1 if first.op_type == "MatMul" else 0
        inputs.append(_concatenated(source, ops, held, axis, f"{path}.{ending}"))
    sizes = [part.quantised.shape[0] if part.quantised else part.shape[1] for part in parts]
    given = {key: attribute.value for key, attribute in first.attributes.items()}
    given |= {"N": sum(sizes)} if "N" in given else {}
    old = [node.outputs[0] for node in nodes]
    (y,) = ops.ops(first.op_type, inputs, name, 1, first.domain, **given)
    y.type = old[0].type
    if old[0].shape is not None:
        y.shape = ir.Shape([*list(old[0].shape)[:-1], sum(sizes)])
    lengths = ops.constant(np.array(sizes), f"{name}.sizes")
    pieces = ops.ops("Split", [y, lengths], f"{name}.parts", len(sizes), axis=-1)
    for before, after in zip(old, pieces, strict=True):
        replace_uses(tuple(before.uses()), before, after)
    constants = {value for node in nodes for value in node.inputs[1:] if value is not None}
    ops.graph.remove(nodes, safe=True)
    for value in constants:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            del ops.graph.initializers[str(value.name)]
    ops.finish()


def _concatenated(
    source: Source, ops: Ops, held: Sequence[ir.Value], axis: int, name: str
) -> ir.Value:
    """A new initializer with the content of several constants, one after the other."""
    import onnx_ir as ir

    tensors = [tensor for value in held if (tensor := constant_of(value)) is not None]

    def make() -> Array:
        return np.concatenate([source.read(tensor) for tensor in tensors], axis=axis)

    if isinstance(tensors[0], ir.ExternalTensor):
        shape = list(constant_shape(held[0]))
        shape[axis] = sum(constant_shape(value)[axis] for value in held)
        tensor = source.external_tensor(ops.free(name), tensors[0], shape, make)
        value = ir.val(tensor.name, const_value=tensor)
        source.model.graph.register_initializer(value)
        return value
    return ops.initializer(make(), name)
