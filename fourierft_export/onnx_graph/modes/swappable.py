"""Mode swappable: the adapter as inputs of the graph, and a branch next to each linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph.ops import Ops
from .adapter_inputs import AdapterInputs, adapter_inputs, group_inputs, write_saved_inputs
from .find_layer_ends import ends_of
from .mode_records import Plan, Written
from .side_branch import SideBranches

if TYPE_CHECKING:
    import onnx_ir as ir


def write(plan: Plan) -> Written:
    """Give a graph inputs for an adapter, and add its change to the outputs of the linear layers.

    Raises:
        UsageError: layers to whose outputs nothing can be added.
        BaseMismatchError: an adapter lacks saved tensors that the base lacks, too.
    """
    ends = ends_of(plan)
    inputs = adapter_inputs(plan)
    written = written_beside(plan, inputs)
    ops = Ops(plan.source.model.graph)
    write_saved_inputs(ops, plan, inputs, written)
    branches = SideBranches(ops)
    for group in inputs.interface.groups:
        tensors = group_inputs(ops, group, inputs.defaults[0])
        written.changed |= branches.add_group(group, tensors, ends)
    ops.finish()
    return written


def written_beside(plan: Plan, inputs: AdapterInputs) -> Written:
    """What is known of a graph whose weights stay: where they are."""
    written = Written(interface=inputs.interface, base=inputs.base)
    for site in plan.every_site:
        if not site.quantised and site.value.is_initializer():
            place = site.name, site.transposed, None
            written.weights.setdefault(site.layer, []).append(place)
    return written


def make_constant(graph: ir.Graph, written: Written) -> None:
    """Make constants of the adapter's inputs: what they hold is all that the graph will compute."""
    import onnx_ir as ir

    groups = written.interface.groups if written.interface else ()
    names = {name for g in groups for name in (g.spectrum, g.entries, g.scaling)}
    for value in [one for one in graph.inputs if one.name in names]:
        graph.inputs.remove(value)
        # Sizes that were symbolic are those of the constant.
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
