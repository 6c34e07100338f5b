"""Mode paired: the adapted weights as inputs of the graph, and a second graph that makes them.

The second graph, the expander, is run once per adapter: it holds the base weights, takes the
adapter inputs of `groups` and gives every adapted weight under the name, and in the layout, that
the first graph takes it. Saved heads and biases go straight to the first graph.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.file import Bundle
from ...types import Array
from ..adapters import adapted_weight, layer_terms
from ..graph.ops import FLOAT32, Ops
from ..graph.source import Source
from ..locate.saved import Place
from ..locate.site import Site
from ..metadata import Written
from ..mode_names import DEFAULTS
from . import functions
from .inputs import AdapterInputs, adapter_inputs, group_inputs, saved_inputs, take_out

if TYPE_CHECKING:
    import onnx_ir as ir

INPUTS_IR_VERSION = 4  # the first whose inputs may have defaults
EXPANDER_OPSET = 18
SIDES = ("rows", "columns")


def write(
    source: Source,
    adapters: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    saved: Mapping[str, Sequence[Place]],
    *,
    defaults: str = DEFAULTS[0],
    absent: Container[str] = (),
) -> Written:
    """Make inputs of the adapted weights, and the graph that turns an adapter into them.

    A packed weight is one input, in which every layer has its part.

    Args, Raises: as in `swappable.write`, but the graph may be of any opset.
    """
    model = source.model
    inputs = adapter_inputs(source, adapters, sites, saved, defaults=defaults, absent=absent)
    written = Written(interface=inputs.interface, base=inputs.base)
    ops = Ops(model.graph)
    saved_inputs(ops, inputs)
    packed: dict[object, list[Site]] = {}
    for several in sites.values():
        for site in several:
            packed.setdefault((site.value, site.consumers), []).append(site)
    weights = []
    for group in packed.values():
        first, parts = group[0], {site.layer: site.rows for site in group}
        base = source.read_constant(first.value)
        held = source.isolate_constant(first.value, first.consumers)
        name, users = str(held.name), tuple(held.uses())
        take_out(ops, held)
        name = ops.free(f"{first.layer}.weight" if first.start is None else name)
        terms = {
            layer: [*layer_terms(adapters, layer).values()] if defaults == DEFAULTS[0] else []
            for layer in parts
        }
        content = adapted_weight(base, parts, terms, transposed=first.transposed)
        value = ops.overridable(content, name)
        for node, index in users:
            node.replace_input_with(index, value)
        weights.append((group, base, name))
        for site in group:
            written.add(site.layer, name, site.transposed, value, site.start)
    ops.finish()
    model.ir_version = max(model.ir_version, INPUTS_IR_VERSION)
    written.expander = _expander(weights, inputs, source)
    return written


def _expander(
    weights: Sequence[tuple[Sequence[Site], Array, str]], inputs: AdapterInputs, source: Source
) -> ir.Model:
    """The graph that turns an adapter into these weights: (sites in it, base, name) each."""
    import onnx_ir as ir

    opset = max(source.opset, EXPANDER_OPSET)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="expander")
    version = source.model.ir_version
    model = ir.Model(graph, ir_version=version, producer_name="fourierft_export")
    functions.add_functions(model)
    ops = Ops(graph)
    groups = inputs.interface.layers
    made: dict[str, tuple[int, ir.Value, ir.Value, list[Sequence[ir.Value]]]] = {}
    for group in inputs.interface.groups:
        spectrum, entries, scaling = group_inputs(ops, group, inputs.defaults[0])
        tables = [
            functions.call_table(ops, entries, axis, length, f"{group.entries}.{side}")
            for axis, (length, side) in enumerate(
                zip(group.shape, ("rows", "columns"), strict=True)
            )
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
