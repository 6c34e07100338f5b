"""Packed weights taken apart: one product per layer, where each weight has to be an input.

y = x [A | B | C] becomes Concat(x A, x B, x C): the same numbers, from three smaller products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UsageError
from ...types import Array
from ..graph.ops import free_name, replace_uses
from ..graph.source import STANDARD, Source, constant_of
from ..locate.content import part_of
from ..locate.site import Site
from ..locate.uses import Use

if TYPE_CHECKING:
    import onnx_ir as ir


def unpacked_sites(source: Source, sites: Mapping[str, Sequence[Site]]) -> dict[str, list[Site]]:
    """The sites, with weights of their own where they were parts of packed ones.

    Args:
        source: the graph, which is changed in place.
        sites: layer -> its float sites.

    Raises:
        UsageError: listing the packed layers that cannot be taken apart.
    """
    packed: dict[tuple[object, ...], list[Site]] = {}
    for several in sites.values():
        for site in several:
            if site.start is not None:
                packed.setdefault((site.value, site.consumers), []).append(site)
    offenders = [
        f"{site.layer}: packed with others in {site.name}, and {why}"
        for group in packed.values()
        if (why := _obstacle(source, group[0]))
        for site in group
    ]
    if offenders:
        raise UsageError(
            source.path,
            expected="layers with weights of their own",
            found=f"{len(offenders)} packed ones that cannot be taken apart",
            remedy="use mode merged or unmerged, which change them where they are",
            offenders=offenders,
        )
    made = {
        site: new
        for group in packed.values()
        for site, new in zip(group, _taken_apart(source, group), strict=True)
    }
    return {layer: [made.get(one, one) for one in several] for layer, several in sites.items()}


def _obstacle(source: Source, site: Site) -> str | None:
    """Why a packed weight cannot be taken apart at this site; None if it can."""
    plain = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    for use in site.uses:
        node = use.linear
        if node.graph is not source.model.graph:
            return f"its {node.op_type} is in a subgraph or function"
        if use.node is not node:
            return f"a {use.node.op_type} comes before the {node.op_type}"
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in STANDARD:
            return f"{node.op_type} uses it"
        found = node.attributes
        if use.index != 1 or any(
            found[name].value != value for name, value in plain.items() if name in found
        ):
            return f"used by {node.op_type} in another way than x W"
    return None


def _taken_apart(source: Source, group: Sequence[Site]) -> list[Site]:
    """The sites of parts of one weight, each with a constant of its own."""
    first, tensor = group[0], constant_of(group[0].value)
    if tensor is None:
        raise ValueError(f"{first.name} is no constant")
    edges = sorted(
        {0, first.outputs, *(edge for s in group for edge in (s.rows.start, s.rows.stop))}
    )
    pieces = {}
    for start, stop in pairwise(edges):
        inputs = first.shape[1]
        shape = (inputs, stop - start) if first.transposed else (stop - start, inputs)
        make = partial(_part, source, first, tensor, start, stop - start)
        pieces[start] = source.add_initializer(f"{first.name}.{start}-{stop}", tensor, shape, make)
    uses: dict[int, list[Use]] = {start: [] for start in pieces}
    for use in first.uses:
        for start, node in _split_product(source, use, pieces).items():
            uses[start].append(replace(use, node=node, linear=node))
    if not first.value.uses() and not first.value.is_graph_output():
        source.model.graph.initializers.pop(first.name, None)
    return [
        replace(
            site,
            value=pieces[site.rows.start],
            uses=tuple(uses[site.rows.start]),
            start=None,
            shared=False,
        )
        for site in group
    ]


def _part(source: Source, site: Site, tensor: ir.TensorProtocol, start: int, size: int) -> Array:
    return np.ascontiguousarray(part_of(source.read(tensor), site.transposed, start, size))


def _split_product(source: Source, use: Use, pieces: Mapping[int, ir.Value]) -> dict[int, ir.Node]:
    """One product per piece in place of the node; start -> node."""
    import onnx_ir as ir

    graph, old = source.model.graph, use.linear
    y, stem = old.outputs[0], old.name or old.outputs[0].name
    users = tuple(y.uses())
    taken = {str(value.name) for node in graph.all_nodes() for value in node.outputs}

    def made(kind: str, inputs: Sequence[ir.Value | None], ending: object, **flags: int) -> ir.Node:
        node = ir.node(kind, inputs, flags, name=f"{stem}.{ending}")
        node.outputs[0].name = free_name(f"{y.name}.{ending}", taken)
        graph.insert_before(old, node)
        return node

    flags = {"transB": 1} if old.op_type == "Gemm" and not use.transposed else {}
    nodes: dict[int, ir.Node] = {}
    for start, piece in pieces.items():
        nodes[start] = made(old.op_type, [old.inputs[0], piece], start, **flags)
        output, width = nodes[start].outputs[0], (piece.shape or (0, 0))[int(use.transposed)]
        output.type = y.type
        output.shape = None if y.shape is None else ir.Shape([*list(y.shape)[:-1], width])
    last = made("Concat", [node.outputs[0] for node in nodes.values()], "joined", axis=-1)
    bias = old.inputs[2] if len(old.inputs) > 2 else None
    if bias is not None:
        last = made("Add", [last.outputs[0], bias], "added")
    replace_uses(users, y, last.outputs[0])
    graph.remove(old, safe=True)
    return nodes
