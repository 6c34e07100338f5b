"""Mode swappable: the adapter as inputs of the graph, and a branch next to each linear layer."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

from ...bundle.file import Bundle
from ..graph.ops import Ops
from ..graph.source import Source
from ..locate.saved import Place
from ..locate.site import Site
from ..metadata import Written
from ..mode_names import DEFAULTS
from .inputs import AdapterInputs, adapter_inputs, group_inputs, saved_inputs
from .layer_inputs_outputs import ends_of
from .side_branch import SideBranches

if TYPE_CHECKING:
    import onnx_ir as ir


def write(
    source: Source,
    adapters: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    saved: Mapping[str, Sequence[Place]],
    *,
    defaults: str = DEFAULTS[0],
    absent: Container[str] = (),
) -> Written:
    """Give a graph inputs for an adapter, and add what they say to its linear layers.

    Args:
        source: the graph, of opset 18 or newer; changed in place.
        adapters: one adapter, bound to the graph.
        sites: layer -> its sites, also quantised ones.
        saved: saved tensor -> its places.
        defaults, absent: as in `adapter_inputs`.

    Raises:
        UsageError: layers to whose outputs nothing can be added.
        BaseMismatchError: as in `adapter_inputs`.
    """
    ends = ends_of(source, sites)
    inputs = adapter_inputs(source, adapters, sites, saved, defaults=defaults, absent=absent)
    written = written_beside(inputs, sites)
    ops = Ops(source.model.graph)
    saved_inputs(ops, inputs)
    branches = SideBranches(ops)
    for group in inputs.interface.groups:
        tensors = group_inputs(ops, group, inputs.defaults[0])
        written.changed |= branches.add_group(group, tensors, ends)
    ops.finish()
    return written


def written_beside(inputs: AdapterInputs, sites: Mapping[str, Sequence[Site]]) -> Written:
    """What is known of a graph whose weights stay: where they are."""
    written = Written(interface=inputs.interface, base=inputs.base)
    for layer, several in sites.items():
        for site in several:
            if not site.quantised and site.value.is_initializer():
                written.add(layer, site.name, site.transposed, None)
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
