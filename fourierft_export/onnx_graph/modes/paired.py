"""Mode paired: the adapted weights as inputs of the graph, and a second graph that makes them.

The second graph, the expander, is run once per adapter: it holds the base weights, takes the
adapter inputs of `groups` and gives every adapted weight under the name, and in the layout, that
the first graph takes it. Saved heads and biases go straight to the first graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...types import Array
from ..adapters import adapted_weight, layer_terms
from ..graph.ops import FLOAT32, Ops
from ..locate.site import Site
from ..mode_names import DEFAULTS
from . import functions
from .adapter_inputs import (
    AdapterInputs,
    adapter_inputs,
    group_inputs,
    take_out,
    write_saved_inputs,
)
from .mode_records import Plan, Written

if TYPE_CHECKING:
    import onnx_ir as ir

INPUTS_IR_VERSION = 4  # the first whose inputs may have defaults
EXPANDER_OPSET = 18


class _Weight(NamedTuple):
    """A weight that becomes an input: the layers in it, the base's values, and its name."""

    sites: Sequence[Site]
    base: Array
    name: str


def write(plan: Plan) -> Written:
    """Make inputs of the adapted weights, and the graph that turns an adapter into them.

    A packed weight is one input, in which every layer has its part.

    Raises:
        BaseMismatchError: an adapter lacks saved tensors that the base lacks, too.
    """
    source, model = plan.source, plan.source.model
    inputs = adapter_inputs(plan)
    written = Written(interface=inputs.interface, base=inputs.base)
    ops = Ops(model.graph)
    write_saved_inputs(ops, plan, inputs, written)
    packed: dict[object, list[Site]] = {}
    for site in plan.every_site:
        packed.setdefault((site.value, site.consumers), []).append(site)
    weights = []
    for group in packed.values():
        first = group[0]
        base = source.read_constant(first.value)
        held = source.isolate_constant(first.value, first.consumers)
        name, users = str(held.name), tuple(held.uses())
        take_out(ops, held)
        name = ops.free(f"{first.layer}.weight" if first.start is None else name)
        with_adapter = plan.defaults == DEFAULTS[0]
        terms = {
            site.layer: [*layer_terms(plan.adapters, site.layer).values()] if with_adapter else []
            for site in group
        }
        parts = {site.layer: site.rows for site in group}
        content = adapted_weight(base, parts, terms, transposed=first.transposed)
        value = ops.overridable(content, name)
        for node, index in users:
            node.replace_input_with(index, value)
        weights.append(_Weight(group, base, name))
        for site in group:
            written.add_weight(site, name, value, site.start)
    ops.finish()
    model.ir_version = max(model.ir_version, INPUTS_IR_VERSION)
    written.expander = _expander(plan, weights, inputs)
    return written


def _expander(plan: Plan, weights: Sequence[_Weight], inputs: AdapterInputs) -> ir.Model:
    """The graph that turns an adapter into these weights."""
    import onnx_ir as ir

    opset = max(plan.source.opset, EXPANDER_OPSET)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="expander")
    version = plan.source.model.ir_version
    model = ir.Model(graph, ir_version=version, producer_name="fourierft_export")
    functions.add_functions(model)
    ops = Ops(graph)
    groups = inputs.interface.layers
    made: dict[str, tuple[int, ir.Value, ir.Value, list[Sequence[ir.Value]]]] = {}
    for group in inputs.interface.groups:
        spectrum, entries, scaling = group_inputs(ops, group, inputs.defaults[0])
        tables = [
            functions.call_table(ops, entries, axis, group.shape[axis], f"{group.entries}.{side}")
            for axis, side in enumerate(("rows", "columns"))
        ]
        made |= {layer: (row, spectrum, scaling, tables) for row, layer in enumerate(group.layers)}
        for sites, base, name in weights:
            # The layers of a packed weight may be of several groups.
            if max(groups[site.layer].index for site in sites) == group.index:
                deltas = []
                for site in sites:
                    stem = name if len(sites) == 1 else f"{name}.{site.layer}"
                    deltas.append(_delta(ops, site, made[site.layer], stem))
                _add(ops, base, deltas, name)
    ops.finish()
    return model


def _delta(
    ops: Ops,
    site: Site,
    inputs: tuple[int, ir.Value, ir.Value, list[Sequence[ir.Value]]],
    name: str,
) -> ir.Value:
    """delta_W of a layer from its row in its group's spectra and scalings, and from the tables."""
    row, spectra, scalings, tables = inputs
    index = ops.constant(np.array(row), f"{name}.row")
    spectrum = ops.op("Gather", [spectra, index], f"{name}.spectrum", axis=0)
    scaling = ops.op("Gather", [scalings, index], f"{name}.scaling", axis=0)
    return functions.call_delta(ops, site, spectrum, scaling, tables, f"{name}.delta")


def _add(ops: Ops, content: Array, deltas: Sequence[ir.Value], name: str) -> None:
    """Make an output of the base weight plus its layers' changes, rounded once."""
    import onnx_ir as ir

    delta = deltas[0] if len(deltas) == 1 else ops.op("Sum", deltas, f"{name}.deltas")
    base = ops.initializer(content, f"{name}.base")
    exact = base.dtype == ir.DataType.FLOAT
    start = base if exact else ops.op("Cast", [base], f"{name}.float32", to=FLOAT32)
    total = ops.op("Add", [start, delta], name if exact else f"{name}.sum")
    if not exact and base.dtype is not None:
        total = ops.op("Cast", [total], name, to=int(base.dtype))
    total.type, total.shape = base.type, base.shape
    ops.graph.outputs.append(total)
