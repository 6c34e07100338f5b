"""An adapter as inputs of a graph: what modes swappable, paired and bank share."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.file import Bundle
from ...bundle.fingerprint import fingerprint
from ...bundle.spec import Fingerprint
from ...types import Array
from ..feeds import base_feeds, full_feeds
from ..graph.ops import Ops, constant_value
from ..graph.source import Source, constant_of
from ..interface import BASE_PREFIX, Group, Interface, Saved, group_layers
from ..locate.content import compare_site, part_of
from ..locate.saved import Place
from ..locate.site import Site, Wanted
from ..mode_names import DEFAULTS

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


def adapter_inputs(
    source: Source,
    adapters: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    saved: Mapping[str, Sequence[Place]],
    *,
    defaults: str = DEFAULTS[0],
    absent: Container[str] = (),
) -> AdapterInputs:
    """The inputs for these adapters, and for any other with the same layers.

    Args:
        source, adapters, sites, saved: as in `merged.write`; layers may be quantised.
        defaults: one of `mode_names.DEFAULTS`.
        absent: saved tensors that the base lacks.

    Raises:
        BaseMismatchError: an adapter lacks tensors of `absent`.
    """
    places: dict[str, list[Place]] = {}
    base: dict[str, Array] = {}
    for name in sorted(saved):
        for place in saved[name]:
            array = source.read_constant(place.value)
            base[name] = array.T if place.transposed else array
            value = source.isolate_constant(place.value, place.uses)
            places.setdefault(name, []).append(Place(value, place.uses, place.transposed))
    interface = Interface(
        group_layers([*adapters.values()]),
        tuple(Saved(n, array.shape, array.dtype.name, n in absent) for n, array in base.items()),
        _fingerprints(source, adapters, sites),
    )
    feeds = [full_feeds(interface, bundle, base) for bundle in adapters.values()]
    if defaults != DEFAULTS[0]:
        feeds = [base_feeds(interface.groups) | base]
    return AdapterInputs(interface, feeds, places, base)


def _fingerprints(
    source: Source, adapters: Mapping[str, Bundle], sites: Mapping[str, Sequence[Site]]
) -> dict[str, Fingerprint]:
    """The base weights' fingerprints, by which adapters that come later are checked.

    An adapter's own where it was trained on the graph's weight (in any precision), else that of the
    graph's weight: an adapter that was accepted although its base is another one must not make its
    like pass the check. Quantised weights that no adapter was trained on have none.
    """
    wanted: dict[str, dict[Wanted, None]] = {}
    for bundle in adapters.values():
        for one in bundle.layers:
            want = Wanted(one.name, one.shape, one.fan_in_fan_out, one.fingerprint)
            wanted.setdefault(one.name, {})[want] = None
    prints: dict[str, Fingerprint] = {}
    for name, several in sites.items():
        for want in wanted.get(name, ()):
            verdicts = {compare_site(source, site, want) for site in several}
            if want.fingerprint is not None and "different" not in verdicts:
                prints.setdefault(name, want.fingerprint)
        site, tensor = several[0], constant_of(several[0].value)
        if name not in prints and not site.quantised and tensor is not None:
            weight = source.read(tensor)
            weight = part_of(weight, site.transposed, site.start, site.shape[0])
            stored_so = any(want.transposed for want in wanted.get(name, ()))
            prints[name] = fingerprint(weight if site.transposed == stored_so else weight.T)
    return prints


def group_inputs(
    ops: Ops, group: Group, defaults: Mapping[str, Array], before: Sequence[str] = ()
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The three inputs of a group; `before` are symbolic sizes in front of the group's own."""
    count = len(group.layers)
    shapes: tuple[tuple[str, list[int | str]], ...] = (
        (group.spectrum, [*before, count, group.size]),
        (group.entries, [*before, group.size, 2]),
        (group.scaling, [*before, count]),
    )
    spectrum, entries, scaling = (
        ops.overridable(defaults[name], name, shape) for name, shape in shapes
    )
    return spectrum, entries, scaling


def saved_inputs(ops: Ops, inputs: AdapterInputs) -> None:
    """Make saved tensors inputs under their own names, in the layout of the adapter.

    The base's own are kept as constants, too, where the defaults differ from them.
    """
    for tensor in inputs.interface.saved:
        places = inputs.places[tensor.name]
        users = [(use, place) for place in places for use in tuple(place.value.uses())]
        for place in places:
            take_out(ops, place.value)
        default, base = inputs.defaults[0][tensor.name], inputs.base[tensor.name]
        value = ops.overridable(default, tensor.name)
        for (node, index), place in users:
            fed = value
            if place.transposed:
                fed = ops.op("Transpose", [value], f"{tensor.name}.turned")
            node.replace_input_with(index, fed)
        if not np.array_equal(base, default):
            ops.initializer(base, BASE_PREFIX + tensor.name)


def take_out(ops: Ops, value: ir.Value) -> None:
    """Remove an initializer, and free its name for an input."""
    name = str(value.name)
    ops.graph.initializers.pop(name)
    ops.release(name)
    if value.is_graph_input():
        ops.graph.inputs.remove(value)


def require_inputs(graph: ir.Graph, base: Mapping[str, Array]) -> None:
    """Take the defaults of all inputs away; the base's saved tensors stay as constants."""
    for value in graph.inputs:
        if graph.initializers.pop(str(value.name), None) is not None:
            value.const_value = None
            kept = BASE_PREFIX + str(value.name)
            if value.name in base and kept not in graph.initializers:
                graph.register_initializer(constant_value(base[str(value.name)], kept))
