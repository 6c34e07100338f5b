"""Shapes and types of values that a graph does not tell, or tells by names of its own.

onnx infers them for its own operators only, and nothing behind an operator of ONNX Runtime's. So
inference works on a copy of the graph in which each of those stands as standard operators whose
output has the same shape and type (`standins`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .source import constant_of
from .standins import put_standins

if TYPE_CHECKING:
    import onnx_ir as ir


def fill_shapes(model: ir.Model) -> None:
    """Infer the shapes and types that a graph does not tell; weights are not read.

    Sizes under other names than the inputs' (`unk__12`) are told by the inputs' names, where they
    are these; the graph's inputs and outputs keep their own.
    """
    from onnx_ir.passes.common import ShapeInferencePass

    names = {size.value for value in model.graph.inputs for size in _symbols(value)}
    told = [value for node in model.graph for value in node.outputs]
    if not any(
        value.shape is None
        or value.dtype is None
        or any(size.value not in names for size in _symbols(value))
        for value in told
    ):
        return
    copy = model.clone()
    for node in copy.graph:
        for value in node.outputs:
            if value.shape is not None:
                _forget(value, names)
    _shape_slices(copy)
    put_standins(copy)
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    inferred = {value.name: value for node in copy.graph for value in node.outputs}
    for value in told:
        if value.name:
            _take(value, inferred[value.name])


def _symbols(value: ir.Value) -> list[ir.SymbolicDim]:
    return (
        [] if value.shape is None else [size for size in value.shape if not isinstance(size, int)]
    )


def _forget(value: ir.Value, names: set[str | None]) -> None:
    """Leave out the sizes under names that are not the inputs': inference would keep them."""
    import onnx_ir as ir

    strange = [size for size in _symbols(value) if size.value not in names]
    if strange and value.shape is not None:
        value.shape = ir.Shape(
            [None if any(size is one for one in strange) else size for size in value.shape]
        )


def _take(value: ir.Value, inferred: ir.Value) -> None:
    """What is inferred, where it is more than what is told."""
    import onnx_ir as ir

    if value.dtype is None and inferred.dtype is not None:
        value.type = ir.TensorType(inferred.dtype)
    if inferred.shape is None or (value.shape is not None and value.is_graph_output()):
        return
    if value.shape is None or len(value.shape) != len(inferred.shape):
        value.shape = inferred.shape
        return
    value.shape = ir.Shape(
        [
            old if not isinstance(new, int) and new.value is None else new
            for old, new in zip(value.shape, inferred.shape, strict=True)
        ]
    )


def _shape_slices(model: ir.Model) -> None:
    """Tell which sizes a slice of a constant keeps (position ids): inference gives up all of them.

    Otherwise the sum with what has the batch would be of a size that nothing knows.
    """
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type != "Slice" or len(node.inputs) < 4:
            continue
        data, axes = (
            None if v is None else constant_of(v) for v in (node.inputs[0], node.inputs[3])
        )
        if data is not None and axes is not None:
            cut = {int(axis) % len(data.shape) for axis in axes.numpy().reshape(-1)}
            told = list(node.outputs[0].shape or [None] * len(data.shape))
            for axis, size in enumerate(data.shape.numpy()):
                if axis not in cut:
                    told[axis] = int(size)
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(told), ir.TensorType(data.dtype)
