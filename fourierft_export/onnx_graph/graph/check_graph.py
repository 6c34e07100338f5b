"""Checks that a model is a valid ONNX graph before a library reads it.

The libraries either print names from the file, or fail later with an error that names nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ...files.onnx_external_data import EXTERNAL, tensors

_MAX_VERSION = 1000  # of opsets of the standard operators


def find_faults(model: Any) -> Iterator[str]:
    """Yield what is wrong with an onnx.ModelProto, one line for each fault."""
    standard = {one.version for one in model.opset_import if one.domain in ("", "ai.onnx")}
    if len(standard) != 1 or not 1 <= min(standard) <= _MAX_VERSION:
        yield f"opset {', '.join(map(str, sorted(standard))) or 'of no standard operators'}"
    yield from (fault for tensor in tensors(model) if (fault := _fault_of_tensor(tensor)))
    yield from _faults_of_graph(model.graph, frozenset())


def _fault_of_tensor(tensor: Any) -> str:
    """Return what is wrong with a tensor's type or the size of its data, "" if nothing."""
    import onnx_ir as ir

    if tensor.data_type == 0 and not tensor.dims:
        return ""  # the empty sparse tensor of another kind of attribute
    try:
        bits = int(ir.DataType(tensor.data_type).bitwidth) if tensor.data_type else 0
    except (ValueError, TypeError):
        bits = 8 if tensor.data_type == ir.DataType.STRING else 0
    if not bits:
        return f"tensor {tensor.name!r} has the unknown element type {tensor.data_type}"
    if min(tensor.dims, default=0) < 0:
        return f"tensor {tensor.name!r} has the shape {list(tensor.dims)}"
    if tensor.data_location == EXTERNAL or not tensor.raw_data:
        return ""
    needed = -(-math.prod(map(int, tensor.dims)) * bits // 8)
    if len(tensor.raw_data) == needed:
        return ""
    return f"tensor {tensor.name!r} has {len(tensor.raw_data)} bytes, its shape needs {needed}"


def _faults_of_graph(graph: Any, outer: frozenset[str]) -> Iterator[str]:
    """Yield the faults of the names in a graph and its subgraphs."""
    stored = [tensor.name for tensor in graph.initializer]
    yield from (f"an initializer twice: {n!r}" for n, k in Counter(stored).items() if k > 1)
    if "" in stored:
        yield "an initializer without a name"
    if graph.sparse_initializer:
        yield "a sparse initializer, which no verb reads"
    made = {name for node in graph.node for name in node.output}
    known = outer | made | {*stored} | {value.name for value in graph.input} | {""}
    for node in graph.node:
        if not node.output:
            yield f"the node {node.name!r} ({node.op_type}) without outputs"
        for name in node.input:
            if name not in known:
                yield f"the input {name!r} of the node {node.name!r} ({node.op_type}), from nowhere"
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _faults_of_graph(inner, frozenset(known))
    for value in graph.output:
        if value.name not in known or not value.name:
            yield f"the output {value.name!r}, which no node makes"
