"""Model-local functions expanded where they are called.

onnx.version_converter and the usual float16 converters fail on functions or skip them; an inlined
graph holds standard operators only. And the modes change weights of the graph, not of functions:
functions that hold an adapted weight are expanded before an adapter is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from ...errors import BadInputError
from .ops import free_name, register_constant, used_names
from .source import STANDARD

if TYPE_CHECKING:
    import onnx_ir as ir


def inline_functions(model: ir.Model) -> None:
    """Replace every call of a function by the function's nodes; no function is left.

    Args:
        model: changed in place; inputs, outputs and initializers keep their names.
    """
    from onnx_ir.passes.common import InlinePass

    domains = {function.domain for function in model.functions.values()}
    InlinePass()(model)
    for domain in domains - {node.domain for node in model.graph.all_nodes()}:
        model.opset_imports.pop(domain, None)


def inline_chosen(
    model: ir.Model, functions: Collection[ir.OperatorIdentifier], path: str | os.PathLike[str]
) -> tuple[str, ...]:
    """Expand some functions, and those that call them; their constants become initializers.

    All calls of a function share one initializer per constant, as they shared the constant.
    (onnx-ir's own pass would make one for each call.)

    Args:
        model: changed in place; other functions stay.
        functions: the functions to expand.
        path: the file, for the error message.

    Returns:
        The names of the expanded functions.

    Raises:
        BadInputError: functions that call themselves, of another opset than the model, or with
            graphs as arguments.
    """
    from onnx_ir.passes import PreconditionError
    from onnx_ir.passes.common import InlinePass

    chosen, size = set(functions), 0
    while len(chosen) > size:
        size = len(chosen)
        chosen |= {
            one
            for one, function in model.functions.items()
            if any(node.op_identifier() in chosen for node in function.all_nodes())
        }
    names = {
        id(tensor): str(value.name)
        for one in chosen
        for value, tensor in _constants(model.functions[one])
    }
    try:
        InlinePass(criteria=lambda function: function.identifier() in chosen)(model)
    except (ValueError, PreconditionError) as error:
        raise BadInputError(
            path,
            expected="functions that can be expanded, as they hold weights of the adapter's layers",
            found=str(error).splitlines()[0],
            remedy="expand them first with onnx.inliner.inline_local_functions",
        ) from None
    _lift(model, names)
    return tuple(sorted(one[1] for one in chosen))


def functions_with_constants(
    model: ir.Model, wanted: Callable[[str, ir.TensorProtocol], bool]
) -> set[ir.OperatorIdentifier]:
    """The functions that hold a constant for which `wanted(name, tensor)` is true."""
    return {
        identifier
        for identifier, function in model.functions.items()
        if any(wanted(str(value.name), tensor) for value, tensor in _constants(function))
    }


def _constants(graph: ir.Function | ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield the output and the tensor of every Constant node."""
    for node in graph.all_nodes():
        if node.op_type == "Constant" and node.domain in STANDARD and "value" in node.attributes:
            attribute = node.attributes["value"]
            if not attribute.is_ref():
                yield node.outputs[0], attribute.as_tensor()


def _lift(model: ir.Model, names: dict[int, str]) -> None:
    """Make Constant nodes of these tensors (id -> name) initializers, one per tensor."""
    found: dict[int, list[ir.Value]] = {}
    for value, tensor in _constants(model.graph):
        if id(tensor) in names and len(tensor.shape) and not value.is_graph_output():
            found.setdefault(id(tensor), []).append(value)
    taken = used_names(model.graph) - {str(v.name) for several in found.values() for v in several}
    for key, several in found.items():
        nodes = [node for node in (value.producer() for value in several) if node is not None]
        tensor = nodes[0].attributes["value"].as_tensor()
        name = free_name(names[key], taken)
        taken.add(name)
        for value in several:
            value.name = None
        lifted = register_constant(model, name, tensor)
        for value, node in zip(several, nodes, strict=True):
            value.replace_all_uses_with(lifted)
            if node.graph is not None:
                node.graph.remove(node)
