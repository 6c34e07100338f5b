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
from ..adapters import layer_terms
from ..graph.ops import FLOAT32, Ops
from ..graph.source import Source, constant_of
from ..groups import Group, WeightInput
from ..locate.saved import Place
from ..locate.site import Site
from ..metadata import Written
from ..mode_names import DEFAULTS
from . import functions
from .inputs import AdapterInputs, adapter_inputs, group_inputs, saved_inputs, take_out
from .unpack import unpacked_sites

if TYPE_CHECKING:
    import onnx_ir as ir

INPUTS_IR_VERSION = 4  # the first whose inputs may have defaults
EXPANDER_OPSET = 18


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

    Args, Raises: as in `swappable.write`, but the graph may be of any opset, and layers that are
        packed with others are taken apart.
    """
    model = source.model
    sites = unpacked_sites(source, sites)
    inputs = adapter_inputs(source, adapters, sites, saved, defaults=defaults, absent=absent)
    written = Written(interface=inputs.interface, base=inputs.base)
    ops = Ops(model.graph)
    saved_inputs(ops, inputs)
    weights = []
    for layer, several in sites.items():
        terms = layer_terms(adapters, layer) if defaults == DEFAULTS[0] else {}
        for site in several:
            tensor = constant_of(site.value)
            if tensor is None:
                raise ValueError(f"{site.name} is no constant")
            base = source.read(tensor)
            held = source.isolate_constant(site.value, site.consumers)
            users = tuple(held.uses())
            take_out(ops, held)
            weight = WeightInput(ops.free(f"{layer}.weight"), layer, base, site.transposed)
            value = ops.overridable(weight.adapted([*terms.values()]), weight.name)
            for node, index in users:
                node.replace_input_with(index, value)
            weights.append(weight)
            written.add(layer, weight.name, weight.transposed, value)
    ops.finish()
    model.ir_version = max(model.ir_version, INPUTS_IR_VERSION)
    written.expander = _expander(weights, inputs, source)
    return written


def _expander(weights: Sequence[WeightInput], inputs: AdapterInputs, source: Source) -> ir.Model:
    """The graph that turns an adapter into these weights."""
    import onnx_ir as ir

    opset = max(source.opset, EXPANDER_OPSET)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="expander")
    version = source.model.ir_version
    model = ir.Model(graph, ir_version=version, producer_name="fourierft_export")
    functions.add_functions(model)
    ops = Ops(graph)
    for group in inputs.interface.groups:
        tensors = group_inputs(ops, group, inputs.defaults[0])
        _expand(ops, group, tensors, [one for one in weights if one.layer in group.layers])
    ops.finish()
    return model


def _expand(
    ops: Ops,
    group: Group,
    tensors: tuple[ir.Value, ir.Value, ir.Value],
    weights: Sequence[WeightInput],
) -> None:
    import onnx_ir as ir

    spectrum, entries, scaling = tensors
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
    for one in weights:
        row = ops.constant(np.array(group.layers.index(one.layer)), f"{one.name}.row")
        picked = [
            ops.op("Gather", [value, row], f"{one.name}.{what}", axis=0)
            for value, what in ((spectrum, "spectrum"), (scaling, "scaling"))
        ]
        first, second = tables[::-1] if one.transposed else tables
        given = [*picked, *first, *second]
        delta = ops.op(functions.DELTA, given, f"{one.name}.delta", domain=functions.DOMAIN)
        base = ops.initializer(one.base, f"{one.name}.base")
        exact = base.dtype == ir.DataType.FLOAT
        start = base if exact else ops.op("Cast", [base], f"{one.name}.float32", to=FLOAT32)
        total = ops.op("Add", [start, delta], one.name if exact else f"{one.name}.sum")
        if not exact and base.dtype is not None:
            total = ops.op("Cast", [total], one.name, to=int(base.dtype))
        total.type, total.shape = base.type, base.shape
        ops.graph.outputs.append(total)
