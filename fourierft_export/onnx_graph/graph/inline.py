"""Model-local functions expanded where they are called.

onnx.version_converter and the usual float16 converters fail on functions or skip them; an inlined
graph holds standard operators only. And the modes change weights of the graph, not of functions:
functions that hold weights are expanded before an adapter is written.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ...errors import BadInputError, first_line
from .function_calls import list_calls
from .ops import free_name, register_constant, used_names
from .source import STANDARD, Source

if TYPE_CHECKING:
    import onnx_ir as ir

_PRODUCTS = ("Einsum", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits")


def inline_functions(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Replace every call of a function by its nodes; no function is left. `path` is for errors."""
    domains = {function.domain for function in model.functions.values()}
    _inline(model, path)
    for domain in domains - {node.domain for node in model.graph.all_nodes()}:
        model.opset_imports.pop(domain, None)


def expand_functions(source: Source, *, products: bool) -> tuple[str, ...]:
    """Expand the functions that hold weights, and those that call them; return their names.

    Weights become initializers. With `products` also functions that multiply are expanded.
    """
    model = source.model
    chosen: set[ir.OperatorIdentifier] = set()
    names: dict[int, str] = {}
    for identifier, calls in list_calls(model, source.path).items():
        function = model.functions[identifier]
        held = {id(t): str(v.name) for v, t in _constants(function) if t.size > 1 and _is_weight(t)}
        multiplies = products and any(n.op_type in _PRODUCTS for n in function.all_nodes())
        if held or multiplies or calls & chosen:
            chosen.add(identifier)
            names |= held
    if not chosen:
        return ()
    _inline(model, source.path, lambda function: function.identifier() in chosen)
    _lift(model, names)
    return tuple(sorted(one[1] for one in chosen))


def _inline(
    model: ir.Model,
    path: str | os.PathLike[str],
    criteria: Callable[[ir.Function], bool] | None = None,
) -> None:
    """Expand the functions that meet the criteria, or all."""
    from onnx_ir.passes import PreconditionError
    from onnx_ir.passes.common import InlinePass

    calls: Counter[ir.OperatorIdentifier] = Counter()
    names: dict[ir.Node | ir.Value, str] = {}

    def number(function: ir.Function) -> bool:
        """Give a function's nodes and values the names of this call, if it is expanded.

        The pass looks for free names by counting from 2, for each call again.
        """
        if criteria is not None and not criteria(function):
            return False
        calls[function.identifier()] += 1
        count = calls[function.identifier()]
        for node in function.all_nodes() if count > 1 else ():
            holders: list[ir.Node | ir.Value] = [node, *node.outputs]
            for one in holders:
                default = "node" if one is node else "val"
                one.name = f"{names.setdefault(one, one.name or default)}_{count}"
        return True

    try:
        InlinePass(criteria=number)(model)
    except (ValueError, RuntimeError, PreconditionError) as error:
        raise BadInputError(
            path,
            expected="functions that can be expanded",
            found=first_line(error),
            remedy="expand them first with onnx.inliner.inline_local_functions",
        ) from None


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    return len(tensor.shape) > (0 if tensor.dtype.is_floating_point() else 1)


def _constants(graph: ir.Function | ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield the output and the tensor of every Constant node."""
    for node in graph.all_nodes():
        if node.op_type == "Constant" and node.domain in STANDARD and "value" in node.attributes:
            attribute = node.attributes["value"]
            if not attribute.is_ref():
                yield node.outputs[0], attribute.as_tensor()


def _lift(model: ir.Model, names: dict[int, str]) -> None:
    """Make Constant nodes of these tensors (id -> name) initializers: all calls share one each.

    onnx-ir's own pass would make one for each call.
    """
    found: dict[int, list[ir.Value]] = {}
    for value, tensor in _constants(model.graph):
        if id(tensor) in names and not value.is_graph_output():
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
