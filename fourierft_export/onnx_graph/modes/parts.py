"""Where layers' x comes in and y goes out, also where several are packed in one linear node.

The outputs of such a node are split and joined again, so that each layer's can be added to. The
weight stays whole, as it may be one that nothing can take apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..graph.ops import Ops, replace_uses

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Outputs:
    """A layer's share in the outputs of a linear node.

    Attributes:
        fed: the node, and the number of its input, at which x comes in.
        y: what comes out, all of it.
        total: number of outputs.
        part: those that are the layer's; None if all are.
    """

    fed: tuple[ir.Node, int]
    y: ir.Value
    total: int
    part: slice | None


@dataclass(frozen=True, eq=False)
class Ends:
    """Where a linear layer's x comes in and its y goes out.

    Attributes:
        fed: the node, and the number of its input, at which x comes in.
        y: what comes out.
    """

    fed: tuple[ir.Node, int]
    y: ir.Value

    @property
    def inputs(self) -> tuple[ir.Value | None]:
        """X as it is now: with the adapter's share, if another adapted layer gives it."""
        return (self.fed[0].inputs[self.fed[1]],)

    @property
    def outputs(self) -> tuple[ir.Value]:
        """Y."""
        return (self.y,)


def ends_of(graph: ir.Graph, outputs: Mapping[str, Sequence[Outputs]]) -> dict[str, list[Ends]]:
    """The layers' ends, each with a y of its own.

    Args:
        graph: gets a Split and a Concat for each packed y.
        outputs: layer -> its shares; types and shapes are known, as far as they can be.
    """
    packed: dict[ir.Value, list[Outputs]] = {}
    for several in outputs.values():
        for one in several:
            if one.part is not None:
                packed.setdefault(one.y, []).append(one)
    pieces: dict[ir.Value, dict[tuple[int, int], ir.Value]] = {}
    if packed:
        ops = Ops(graph)
        for y, group in packed.items():
            parts = [one.part for one in group if one.part is not None]
            pieces[y] = _split(ops, y, group[0].total, parts)
        ops.finish()
    return {
        layer: [
            Ends(one.fed, pieces[one.y][one.part.start, one.part.stop] if one.part else one.y)
            for one in several
        ]
        for layer, several in outputs.items()
    }


def _split(
    ops: Ops, y: ir.Value, total: int, parts: Iterable[slice]
) -> dict[tuple[int, int], ir.Value]:
    """Ranges of y's last axis; whatever used y uses the joined ones afterwards."""
    import onnx_ir as ir

    edges = sorted({0, total, *(edge for part in parts for edge in (part.start, part.stop))})
    ranges = list(pairwise(edges))
    sizes = np.array([stop - start for start, stop in ranges])
    users, stem = tuple(y.uses()), str(y.name)
    lengths = ops.constant(sizes, f"{stem}.sizes")
    pieces = ops.ops("Split", [y, lengths], f"{stem}.parts", len(ranges), axis=-1)
    for piece, (start, stop) in zip(pieces, ranges, strict=True):
        piece.type = y.type
        piece.shape = None if y.shape is None else ir.Shape([*list(y.shape)[:-1], stop - start])
    replace_uses(users, y, ops.op("Concat", pieces, f"{stem}.joined", axis=-1))
    return dict(zip(ranges, pieces, strict=True))
