"""New nodes for a graph: named, with equal constants made once, in order at the end."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...types import Array

if TYPE_CHECKING:
    import onnx_ir as ir


FLOAT32 = 1  # onnx.TensorProto.FLOAT


class Ops:
    """Adds nodes and constants to a graph; `finish` sorts it, as they may feed older nodes.

    New nodes that depend on constants only can be put `ahead` of all others instead.
    """

    def __init__(self, graph: ir.Graph, *, ahead: bool = False) -> None:
        self.graph = graph
        self._ahead: list[ir.Node] | None = [] if ahead else None
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        nodes = [node for node in graph if node.name]
        self._names = {str(node.name) for node in nodes} | used_names(graph)

    def free(self, name: str) -> str:
        """Reserve `name` and return it, with a number appended if the graph uses it already."""
        name = free_name(name, self._names)
        self._names.add(name)
        return name

    def release(self, name: str) -> None:
        """Make a reserved name available again."""
        self._names.discard(name)

    def op(self, kind: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        """Add a node with one output and return the output; both are called `name`."""
        return self.ops(kind, inputs, name, 1, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        name: str,
        outputs: int | Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node and return its outputs: `outputs` many, or one for each name suffix in it."""
        import onnx_ir as ir

        name = self.free(name)
        endings = range(outputs) if isinstance(outputs, int) else outputs
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=len(endings), name=name)
        for ending, output in zip(endings, node.outputs, strict=True):
            output.name = name if outputs == 1 else self.free(f"{name}.{ending}")
        if self._ahead is None:
            self.graph.append(node)
        else:
            self._ahead.append(node)
        return node.outputs

    def constant(self, content: npt.ArrayLike, name: str) -> ir.Value:
        """Return an initializer with this content; equal constants share one."""
        array = np.asarray(content)
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self.initializer(array, name)
        return self._constants[key]

    def initializer(self, array: Array, name: str) -> ir.Value:
        """Add an initializer; its name gets a number if it is taken."""
        value = constant_value(array, self.free(name))
        self.graph.register_initializer(value)
        return value

    def overridable(
        self, array: Array, name: str, shape: Sequence[int | str] | None = None
    ) -> ir.Value:
        """Add a graph input of exactly this name with a default value; `shape` may name sizes."""
        import onnx_ir as ir

        value = constant_value(array, name)
        self._names.add(name)
        self.graph.register_initializer(value)
        if shape is not None:
            value.shape = ir.Shape(shape)
        self.graph.inputs.append(value)
        return value

    def finish(self) -> None:
        """Sort the nodes so that each comes after those that feed it."""
        if self._ahead is None:
            self.graph.sort()
        else:
            self.graph.insert_before(self.graph[0], self._ahead)


def constant_value(array: Array, name: str) -> ir.Value:
    """Make a constant value that is in no graph yet."""
    import onnx_ir as ir

    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    return ir.val(name, const_value=tensor)


def register_constant(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer to the main graph."""
    import onnx_ir as ir

    value = ir.val(name, const_value=tensor)
    model.graph.register_initializer(value)
    # Before version 4 of the format every initializer had to be an input, too.
    model.ir_version = max(model.ir_version, 4)
    return value


def used_names(graph: ir.Graph) -> set[str]:
    """The names of all values in a graph and its subgraphs."""
    names = {str(value.name) for node in graph.all_nodes() for value in node.outputs}
    names |= {str(value.name) for value in graph.inputs}
    return names | {name for one in (graph, *graph.subgraphs()) for name in one.initializers}


def free_name(name: str, taken: Container[str]) -> str:
    """`name`, with a number appended if it is taken."""
    numbers = itertools.count(1)
    free = name
    while free in taken:
        free = f"{name}.{next(numbers)}"
    return free


def replace_uses(users: Sequence[tuple[ir.Node, int]], old: ir.Value, new: ir.Value) -> None:
    """Feed `new` to `users` of `old` and give it the type and shape, and a graph output's name."""
    for node, index in users:
        node.replace_input_with(index, new)
    new.type, new.shape = old.type, old.shape
    graph = old.graph
    if graph is not None and old.is_graph_output():
        old.name, new.name = f"{old.name}.base", old.name
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
