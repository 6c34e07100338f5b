"""An adapter as inputs of a graph: what modes swappable, paired and bank share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...bundle.fingerprint import fingerprint
from ...bundle.spec import Fingerprint
from ...types import Array
from ..adapter_interface import BASE_PREFIX, PREFIX, Group, Interface, Saved, group_layers
from ..feeds import base_feeds, full_feeds
from ..graph.ops import Ops, constant_value, free_name, used_names
from ..graph.source import constant_of
from ..locate.saved import Place
from ..locate.site import Wanted, compare_site, part_of
from ..mode_names import DEFAULTS
from .mode_records import Plan, Written

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class AdapterInputs:
    """The adapter inputs of a graph, and what they hold when nothing is fed.

    Attributes:
        interface: which there are.
        defaults: per adapter that stays in the file its feeds; those of the base if none does.
        places: saved tensor -> its places, each an initializer that nothing else uses.
        base: saved tensor -> the base's own.
    """

    interface: Interface
    defaults: Sequence[Mapping[str, Array]]
    places: Mapping[str, Sequence[Place]]
    base: Mapping[str, Array]


def adapter_inputs(plan: Plan) -> AdapterInputs:
    """The inputs for these adapters, and for any other with the same layers.

    Raises:
        BaseMismatchError: an adapter lacks tensors that the base lacks, too.
    """
    source, graph = plan.source, plan.source.model.graph
    places: dict[str, list[Place]] = {}
    base: dict[str, Array] = {}
    for name in sorted(plan.saved):
        for place in plan.saved[name]:
            array = source.read_constant(place.value)
            base[name] = array.T if place.transposed else array
            value = source.isolate_constant(place.value, place.uses)
            places.setdefault(name, []).append(Place(value, place.uses, place.transposed))
        kept = graph.initializers.get(name)  # other nodes keep it: its name is the input's now
        if kept is not None and all(kept is not place.value for place in places[name]):
            kept.name = free_name(f"{name}.base", used_names(graph))
    interface = Interface(
        group_layers([*plan.adapters.values()]),
        tuple(
            Saved(n, array.shape, array.dtype.name, n in plan.absent) for n, array in base.items()
        ),
        _fingerprints(plan),
        any(
            len(plan.sources.get(name, one).layers) > len(one.layers)
            for name, one in plan.adapters.items()
        ),
    )
    feeds = [full_feeds(interface, bundle, base) for bundle in plan.adapters.values()]
    if plan.defaults != DEFAULTS[0]:
        feeds = [base_feeds(interface.groups) | base]
    return AdapterInputs(interface, feeds, places, base)


def _fingerprints(plan: Plan) -> dict[str, Fingerprint]:
    """The base weights' fingerprints, by which adapters that come later are checked.

    An adapter's own where it was trained on the graph's weight (in any precision), else that of the
    graph's weight: an adapter that was accepted although its base is another one must not make its
    like pass the check. Quantised weights that no adapter was trained on have none.
    """
    wanted: dict[str, dict[Wanted, None]] = {}
    for bundle in plan.adapters.values():
        for one in bundle.layers:
            want = Wanted(one.name, one.shape, one.fan_in_fan_out, one.fingerprint)
            wanted.setdefault(one.name, {})[want] = None
    prints: dict[str, Fingerprint] = {}
    for name, several in plan.sites.items():
        for want in wanted.get(name, ()):
            verdicts = {compare_site(plan.source, site, want) for site in several}
            if want.fingerprint is not None and "different" not in verdicts:
                prints.setdefault(name, want.fingerprint)
        site, tensor = several[0], constant_of(several[0].value)
        if name not in prints and not site.quantised and tensor is not None:
            weight = plan.source.read(tensor)
            weight = part_of(weight, site.transposed, site.start, site.shape[0])
            stored_so = any(want.transposed for want in wanted.get(name, ()))
            prints[name] = fingerprint(weight if site.transposed == stored_so else weight.T)
    return prints


def group_inputs(
    ops: Ops, group: Group, defaults: Mapping[str, Array], before: Sequence[str] = ()
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The three inputs of a group; `before` are symbolic sizes in front of the group's own."""
    count, size = len(group.layers), f"{PREFIX}n.{group.index}"
    shapes: tuple[tuple[str, list[int | str]], ...] = (
        (group.spectrum, [*before, count, size]),
        (group.entries, [*before, size, 2]),
        (group.scaling, [*before, count]),
    )
    spectrum, entries, scaling = (
        ops.overridable(defaults[name], name, shape) for name, shape in shapes
    )
    return spectrum, entries, scaling


def write_saved_inputs(ops: Ops, plan: Plan, inputs: AdapterInputs, written: Written) -> None:
    """Make saved tensors inputs under their own names, in the layout of the adapter.

    The base's own are kept as constants, too, where an adapter has its own.
    """
    for tensor in inputs.interface.saved:
        places = inputs.places[tensor.name]
        users = [(use, place) for place in places for use in tuple(place.value.uses())]
        for place in places:
            take_out(ops, place.value)
        default, base = inputs.defaults[0][tensor.name], inputs.base[tensor.name]
        value = ops.overridable(default, tensor.name)
        written.changed[tensor.name] = [value]
        for (node, index), place in users:
            fed = value
            if place.transposed:
                fed = ops.op("Transpose", [value], f"{tensor.name}.turned")
            node.replace_input_with(index, fed)
        if any(tensor.name in bundle.saved for bundle in plan.adapters.values()):
            ops.initializer(base, BASE_PREFIX + tensor.name)


def take_out(ops: Ops, value: ir.Value) -> None:
    """Remove an initializer, and free its name for an input."""
    name = str(value.name)
    ops.graph.initializers.pop(name)
    ops.release(name)
    if value.is_graph_input():
        ops.graph.inputs.remove(value)


def require_inputs(
    graph: ir.Graph, inputs: Collection[ir.Value], base: Mapping[str, Array]
) -> None:
    """Take the defaults of inputs away; the base's saved tensors stay as constants."""
    for value in inputs:
        if graph.initializers.pop(str(value.name), None) is not None:
            value.const_value = None
            kept = BASE_PREFIX + str(value.name)
            if value.name in base and kept not in graph.initializers:
                graph.register_initializer(constant_value(base[str(value.name)], kept))
