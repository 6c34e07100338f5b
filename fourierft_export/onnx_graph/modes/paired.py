"""Mode paired: the adapted weights as inputs of the graph, and a second graph that makes them.

The second graph, the expander, is run once per adapter: it holds the base weights, takes the
adapter inputs of `groups` and gives every adapted weight under the name, and in the layout, that
the first graph takes it. Saved heads and biases go straight to the first graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...spectral.delta import Term
from ...types import Array
from ..graph.ops import FLOAT32, Ops
from ..groups import Group, Interface
from ..locate.linears import SavedSite
from ..locate.marks import WeightSite
from ..weight_input import WeightInput
from . import functions
from .swappable import group_inputs, saved_inputs, take_out

if TYPE_CHECKING:
    import onnx_ir as ir


def write_paired(
    model: ir.Model,
    sites: Iterable[WeightSite],
    weights: Mapping[str, tuple[Array, bool]],
    interface: Interface,
    terms: Mapping[str, Sequence[Term]],
    defaults: Mapping[str, Array],
    saved: Iterable[SavedSite] = (),
    base_saved: Mapping[str, Array] | None = None,
) -> list[WeightInput]:
    """Make inputs of the adapted weights.

    Args:
        model: changed in place.
        sites: where the weights are.
        weights: layer -> (base weight as the model stores it, which is (in, out)).
        interface: the adapter inputs of the expander; its saved tensors become inputs here.
        terms: layer -> the adapter whose weights are the defaults; absent for the base's.
        defaults: of the saved tensors.
        saved, base_saved: as in `swappable.write_swappable`.
    """
    ops = Ops(model.graph)
    saved_inputs(ops, interface, defaults, saved, base_saved or {})
    inputs = []
    for site in sites:
        stored, fan_in_fan_out = weights[site.layer]
        base = np.ascontiguousarray(stored.T if site.turned else stored)
        users = tuple(site.value.uses())
        take_out(ops, site.value)
        made = WeightInput(
            ops.free(f"{site.layer}.weight"), site.layer, base, site.turned != fan_in_fan_out
        )
        value = ops.overridable(made.adapted(terms.get(site.layer, ())), made.name)
        for node, index in users:
            node.replace_input_with(index, value)
        inputs.append(made)
    ops.finish()
    return inputs


def expander(
    inputs: Sequence[WeightInput],
    interface: Interface,
    defaults: Mapping[str, Array],
    *,
    opset: int,
    ir_version: int,
) -> ir.Model:
    """The graph that turns an adapter into the weights `inputs`.

    Args:
        inputs: from `write_paired`.
        interface: its groups are the inputs of this graph.
        defaults: of the groups' inputs.
        opset, ir_version: as the model's.
    """
    import onnx_ir as ir

    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="expander")
    model = ir.Model(graph, ir_version=ir_version, producer_name="fourierft_export")
    functions.add_functions(model)
    ops = Ops(graph)
    for group in interface.groups:
        _expand(ops, group, [i for i in inputs if i.layer in group.layers], defaults)
    ops.finish()
    return model


def _expand(
    ops: Ops, group: Group, inputs: Sequence[WeightInput], defaults: Mapping[str, Array]
) -> None:
    import onnx_ir as ir

    spectrum, entries, scaling = group_inputs(ops, group, defaults)
    tables = [
        ops.ops(
            functions.TABLE,
            [entries],
            f"{group.entries}.{side}",
            len(functions.TABLE_OUTPUTS),
            domain=functions.DOMAIN,
            axis=axis,
            length=group.shape[axis],
        )
        for axis, side in enumerate(("rows", "columns"))
    ]
    for one in inputs:
        row = ops.constant(np.array(group.layers.index(one.layer)), f"{one.name}.row")
        picked = [
            ops.op("Gather", [value, row], f"{one.name}.{what}", axis=0)
            for value, what in ((spectrum, "spectrum"), (scaling, "scaling"))
        ]
        sides = tables[::-1] if one.transposed else tables
        delta = ops.op(
            functions.DELTA,
            [*picked, *sides[0], *sides[1]],
            f"{one.name}.delta",
            domain=functions.DOMAIN,
        )
        base = ops.initializer(one.base, f"{one.name}.base")
        exact = base.dtype == ir.DataType.FLOAT
        start = base if exact else ops.op("Cast", [base], f"{one.name}.float32", to=FLOAT32)
        total = ops.op("Add", [start, delta], one.name if exact else f"{one.name}.sum")
        if not exact and base.dtype is not None:
            total = ops.op("Cast", [total], one.name, to=int(base.dtype))
        total.type, total.shape = base.type, base.shape
        ops.graph.outputs.append(total)
