"""Which functions call which, and how many nodes their calls come to."""

from __future__ import annotations

import os
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from ...errors import BadInputError

if TYPE_CHECKING:
    import onnx_ir as ir

_MAX_NODES = 100_000  # functions may call each other 2^n times


def list_calls(
    model: ir.Model, path: str | os.PathLike[str]
) -> dict[ir.OperatorIdentifier, set[ir.OperatorIdentifier]]:
    """Function -> the functions that it calls, callees first."""
    functions = model.functions
    called = {
        identifier: [node.op_identifier() for node in function.all_nodes()]
        for identifier, function in functions.items()
    }
    calls = {identifier: {*names} & functions.keys() for identifier, names in called.items()}
    sizes: dict[ir.OperatorIdentifier, int] = {}
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError:
        order = []
    for identifier in order:
        sizes[identifier] = sum(sizes.get(name, 1) for name in called[identifier])
    nodes = sum(sizes.get(node.op_identifier(), 0) for node in model.graph.all_nodes())
    if len(order) < len(calls) or nodes > _MAX_NODES:
        raise BadInputError(
            path,
            expected=f"functions that come to at most {_MAX_NODES:,} nodes",
            found="more" if order else "functions that call each other without end",
        )
    return {identifier: calls[identifier] for identifier in order}
