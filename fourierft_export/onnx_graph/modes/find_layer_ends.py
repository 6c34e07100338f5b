"""Where layers' x comes in and y goes out, also where several are packed in one linear node.

The outputs of such a node are split and joined again, so that each layer's can be added to. The
weight stays whole, as it may be one that nothing can take apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UsageError
from ..graph.ops import Ops, replace_uses
from ..graph.source import Source, constant_of
from ..locate.site import Site
from .mode_records import Plan

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Ends:
    """Where a linear layer's x comes in and its y goes out.

    Attributes:
        fed: the node, and the number of its input, at which x comes in.
        y: what comes out.
        factor: y is this times x W^T.
    """

    fed: tuple[ir.Node, int]
    y: ir.Value
    factor: float = 1.0

    @property
    def x(self) -> ir.Value:
        """The current x: with the adapter's change, if it comes from another adapted layer."""
        value = self.fed[0].inputs[self.fed[1]]
        if value is None:
            raise ValueError(f"nothing is fed to {self.fed[0].name}")
        return value


def ends_of(plan: Plan) -> dict[str, list[Ends]]:
    """Find each layer's x and y; layers that share one product get a y each, by Split and Concat.

    Raises:
        UsageError: layers to whose outputs nothing can be added: all of them listed.
    """
    source, every = plan.source, plan.every_site
    offenders = [f"{site.layer}: {why}" for site in every if (why := _obstacle(source, site))]
    if offenders:
        raise UsageError(
            source.path,
            expected="layers that are a MatMul or Gemm of the main graph each",
            found=f"{len(offenders)} layers that are not",
            remedy="adapt these layers before the others are quantised"
            if plan.has_quantised
            else "use mode paired, merged or unmerged",
            offenders=offenders,
        )
    packed: dict[ir.Value, list[Site]] = {}
    for site in every:
        _set_output_types(site)
        for _, y, _ in site.products if site.start is not None else ():
            packed.setdefault(y, []).append(site)
    pieces: dict[ir.Value, dict[int, ir.Value]] = {}
    if packed:
        ops = Ops(source.model.graph)
        for y, group in packed.items():
            pieces[y] = _split(ops, y, group[0].outputs, [site.rows for site in group])
        ops.finish()
    return {
        layer: [
            Ends(fed, y if site.start is None else pieces[y][site.start], factor)
            for site in several
            for fed, y, factor in site.products
        ]
        for layer, several in plan.sites.items()
    }


def _set_output_types(site: Site) -> None:
    """Give y the dtype of the weight, or of its scales, where shape inference found none."""
    import onnx_ir as ir

    places = [(use.linear.inputs[1], use.linear.outputs[0]) for use in site.uses]
    if site.quantised is not None and site.quantised.scale is not None:
        node, index = site.quantised.scale
        places = [(node.inputs[index], site.quantised.y)]
    for value, y in places:
        dtype = _dtype_of(value) if y.dtype is None else None
        if dtype is not None:
            y.type = ir.TensorType(dtype)


def _dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The dtype of a value, also behind a Cast, Transpose or Identity."""
    import onnx_ir as ir

    tensor = constant_of(value)
    if value is None or tensor is not None:
        return None if tensor is None else tensor.dtype
    node = value.producer()
    if value.dtype is not None or node is None:
        return value.dtype
    if node.op_type not in ("Cast", "Identity", "Transpose"):
        return None
    cast = node.attributes.get("to")
    return _dtype_of(node.inputs[0]) if cast is None else ir.DataType(cast.as_int())


def _obstacle(source: Source, site: Site) -> str | None:
    """Why nothing can be added to the output of this layer."""
    for use in () if site.quantised else site.uses:
        node = use.linear
        if node.graph is not source.model.graph:
            return f"its {node.op_type} is in a subgraph or function, which sees no adapter"
        if not use.plain or use.factor is None:
            return f"{site.name} is used by {node.op_type} in another way than x W"
        if use.transposed != site.transposed:
            return f"{site.name} is used by {node.op_type} in both orientations"
    return None


def _split(ops: Ops, y: ir.Value, total: int, parts: Iterable[slice]) -> dict[int, ir.Value]:
    """Ranges of y's last axis by their start; what used y uses the joined ones afterwards."""
    import onnx_ir as ir

    edges = sorted({0, total, *(edge for part in parts for edge in (part.start, part.stop))})
    sizes = np.diff(edges)
    users, stem = tuple(y.uses()), str(y.name)
    lengths = ops.constant(sizes, f"{stem}.sizes")
    pieces = ops.ops("Split", [y, lengths], f"{stem}.parts", len(sizes), axis=-1)
    for piece, size in zip(pieces, sizes, strict=True):
        piece.type = y.type
        piece.shape = None if y.shape is None else ir.Shape([*list(y.shape)[:-1], int(size)])
    replace_uses(users, y, ops.op("Concat", pieces, f"{stem}.joined", axis=-1))
    return dict(zip(edges, pieces, strict=False))
