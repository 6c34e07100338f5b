"""Model-local functions expanded where they are called.

onnx.version_converter and the usual float16 converters fail on functions or leave them as they are;
after this a graph holds standard operators only. And a weight inside a function is out of reach of
everything that looks at the graph: such functions are expanded before an adapter goes in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from ...errors import BadInputError
from .ops import STANDARD, free_name

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


def inline_some(
    model: ir.Model, functions: Collection[ir.OperatorIdentifier], path: str | os.PathLike[str]
) -> tuple[str, ...]:
    """Expand some functions, and those that call them; their constants become initializers.

    A function's constant is one for all its calls, and so is the initializer: what changes it for
    one call changes it for all, as before.

    Args:
        model: changed in place; other functions stay.
        functions: which.
        path: the file, to say so where that cannot be done.

    Returns:
        The names of those that were expanded.

    Raises:
        BadInputError: functions that call themselves, of another opset than the model, or with
            graphs as arguments.
    """
    from onnx_ir.passes import PreconditionError
    from onnx_ir.passes.common import InlinePass

    chosen = set(functions)
    while (
        more := {one for one, function in model.functions.items() if _calls(function) & chosen}
        - chosen
    ):
        chosen |= more
    names = {
        id(tensor): str(value.name)
        for one in chosen
        for value, tensor in function_constants(model.functions[one])
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


def function_constants(
    function: ir.Function,
) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """The tensors that a function holds, with the values that they are."""
    for node in function.all_nodes():
        if node.op_type == "Constant" and node.domain in STANDARD and "value" in node.attributes:
            attribute = node.attributes["value"]
            if not attribute.is_ref():
                yield node.outputs[0], attribute.as_tensor()


def holders(
    model: ir.Model, wanted: Callable[[str, ir.TensorProtocol], bool]
) -> set[ir.OperatorIdentifier]:
    """The functions that hold a constant that `wanted(name, tensor)` tells."""
    return {
        identifier
        for identifier, function in model.functions.items()
        if any(wanted(str(value.name), tensor) for value, tensor in function_constants(function))
    }


def _calls(function: ir.Function) -> set[ir.OperatorIdentifier]:
    return {node.op_identifier() for node in function.all_nodes()}


def _lift(model: ir.Model, names: dict[int, str]) -> None:
    """Make Constant nodes of these tensors (by identity) initializers, one per tensor.

    Args:
        model: changed in place.
        names: id of a tensor -> its name.
    """
    import onnx_ir as ir

    graph = model.graph
    found: dict[int, list[ir.Node]] = {}
    for node in graph.all_nodes():
        if node.op_type != "Constant" or "value" not in node.attributes:
            continue
        tensor = node.attributes["value"].as_tensor()
        if id(tensor) in names and len(tensor.shape) and not node.outputs[0].is_graph_output():
            found.setdefault(id(tensor), []).append(node)
    lifted = {id(node) for nodes in found.values() for node in nodes}
    taken = {
        str(value.name)
        for node in graph.all_nodes()
        for value in node.outputs
        if id(node) not in lifted
    }
    taken |= {str(value.name) for value in graph.inputs}
    taken |= {name for one in (graph, *graph.subgraphs()) for name in one.initializers}
    for key, nodes in found.items():
        tensor = nodes[0].attributes["value"].as_tensor()
        name = free_name(names[key], taken)
        taken.add(name)
        users = [use for node in nodes for use in node.outputs[0].uses()]
        for node in nodes:
            node.outputs[0].name = None
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        for user, index in users:
            user.replace_input_with(index, value)
        for node in nodes:
            if node.graph is not None:
                node.graph.remove(node)
    model.ir_version = max(model.ir_version, 4)
