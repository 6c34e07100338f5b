"""Packed weights taken apart: one product per layer, where each weight has to be an input.

y = x [A | B | C] becomes Concat(x A, x B, x C): the same numbers, from three smaller products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ...types import Array
from ..graph.edits import Edits
from ..graph.ops import free_name, replace_uses
from ..graph.source import STANDARD, constant_of
from ..locate.content import part_of
from ..locate.site import Site
from ..locate.uses import Use

if TYPE_CHECKING:
    import onnx_ir as ir


def unpack_sites(edits: Edits, sites: Mapping[str, Sequence[Site]]) -> dict[str, list[Site]]:
    """The sites, with weights of their own where they were parts of packed ones.

    Those in subgraphs and functions, or used otherwise than by a plain MatMul or Gemm, are as they
    were.

    Args:
        edits: of the graph, which is changed in place.
        sites: layer -> its sites.
    """
    packed: dict[tuple[str, tuple[int, ...]], list[Site]] = {}
    for several in sites.values():
        for site in several:
            if site.start is not None and whole_for(edits, site) is None:
                key = site.name, tuple(id(use.node) for use in site.uses)
                packed.setdefault(key, []).append(site)
    made: dict[tuple[str, int], Site] = {}
    for group in packed.values():
        for site, new in zip(group, _taken_apart(edits, group), strict=True):
            made[site.layer, id(site)] = new
    return {
        layer: [made.get((layer, id(site)), site) for site in several]
        for layer, several in sites.items()
    }


def whole_for(edits: Edits, site: Site) -> str | None:
    """Why a packed weight cannot be taken apart at this site; None if it can."""
    for use in site.uses:
        node = use.linear
        settings = {"transA": 0, "alpha": 1.0, "beta": 1.0}
        same = all(
            node.attributes[name].value == value
            for name, value in settings.items()
            if name in node.attributes
        )
        if node.graph is not edits.source.model.graph:
            return f"its {node.op_type} is in a subgraph or function"
        if use.node is not node:
            return f"a {use.node.op_type} comes before the {node.op_type}"
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in STANDARD:
            return f"{node.op_type} uses it"
        if use.index != 1 or not same:
            return f"used by {node.op_type} in another way than x W"
    return None


def _taken_apart(edits: Edits, group: Sequence[Site]) -> list[Site]:
    """The sites of parts of one weight, each with a constant of its own."""
    first = group[0]
    starts = [site.start or 0 for site in group]
    stops = [start + site.shape[0] for start, site in zip(starts, group, strict=True)]
    edges = sorted({0, first.outputs, *starts, *stops})
    pieces = {start: _piece(edits, first, start, stop) for start, stop in pairwise(edges)}
    uses: dict[int, list[Use]] = {start: [] for start in pieces}
    for use in first.uses:
        for start, node in _split(edits, use, pieces).items():
            uses[start].append(replace(use, node=node, linear=node))
    value = first.value
    if not value.uses() and value.is_initializer() and not value.is_graph_output():
        edits.source.model.graph.initializers.pop(str(value.name), None)
    return [
        replace(
            site,
            value=pieces[start],
            uses=tuple(uses[start]),
            start=None,
            shared=False,
        )
        for start, site in zip(starts, group, strict=True)
    ]


def _shape(value: ir.Value) -> tuple[int, int]:
    tensor = constant_of(value)
    rows, columns = tensor.shape.numpy() if tensor is not None else (0, 0)
    return int(rows), int(columns)


def _piece(edits: Edits, site: Site, start: int, stop: int) -> ir.Value:
    tensor = constant_of(site.value)
    if tensor is None:
        raise ValueError(f"{site.name} is no constant")
    rows, columns = _shape(site.value)
    shape = (rows, stop - start) if site.transposed else (stop - start, columns)

    def make() -> Array:
        part = part_of(edits.source.read(tensor), site.transposed, start, stop - start)
        return np.ascontiguousarray(part)

    return edits.new(f"{site.name}.{start}-{stop}", tensor, shape, make)


def _split(edits: Edits, use: Use, pieces: Mapping[int, ir.Value]) -> dict[int, ir.Node]:
    """One product per piece in place of the node; start -> node."""
    import onnx_ir as ir

    graph, old = edits.source.model.graph, use.linear
    y, stem = old.outputs[0], old.name or old.outputs[0].name
    taken = {str(value.name) for node in graph.all_nodes() for value in node.outputs}
    attributes = {k: v for k, v in old.attributes.items() if k == "transB"}
    nodes: dict[int, ir.Node] = {}
    for start, piece in pieces.items():
        node = ir.Node(
            "", old.op_type, [old.inputs[0], piece], attributes.values(), name=f"{stem}.{start}"
        )
        output = node.outputs[0]
        output.name = free_name(f"{y.name}.{start}", taken)
        output.type = y.type
        if y.shape is not None:
            width = _shape(piece)[1 if use.transposed else 0]
            output.shape = ir.Shape([*list(y.shape)[:-1], width])
        nodes[start] = node
    users = tuple(y.uses())
    joined = ir.node("Concat", [n.outputs[0] for n in nodes.values()], {"axis": -1})
    joined.name = f"{stem}.joined"
    joined.outputs[0].name = free_name(f"{y.name}.joined", taken)
    made = [*nodes.values(), joined]
    bias = old.inputs[2] if len(old.inputs) > 2 else None
    if bias is not None:
        added = ir.node("Add", [joined.outputs[0], bias], name=f"{stem}.added")
        added.outputs[0].name = free_name(f"{y.name}.added", taken)
        made.append(added)
    graph.insert_before(old, made)
    replace_uses(users, y, made[-1].outputs[0])
    graph.remove(old, safe=True)
    return nodes
