"""Adapters beside the linear layers of a graph that others made, also beside quantised ones.

The adapter's tensors are inputs of the graph (swappable, bank), or constants (unmerged, where a
weight is quantised and W + delta_W cannot be had).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...bundle.file import Bundle
from ...bundle.fingerprint import fingerprint, judge
from ...bundle.spec import Fingerprint, LayerSpec
from ...errors import UsageError
from ...types import Array
from ..fit import full_feeds
from ..graph.edits import Edits
from ..graph.shapes import fill_shapes
from ..graph.source import Source, constant_of
from ..groups import Interface, Saved, group_layers, table
from ..locate.content import part_of, verdict
from ..locate.linears import SavedSite
from ..locate.saved import Place
from ..locate.site import Site, Wanted
from ..locate.uses import source_of
from ..mode_names import BANK, UNMERGED
from .bank import write_bank
from .batched import batch_of
from .parts import Ends, Outputs, ends_of
from .swappable import write_swappable

SIDE_OPSET = 18


def write_beside(
    edits: Edits,
    mode: str,
    bundles: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    quantised: Mapping[str, Sequence[Site]],
    places: Mapping[str, Place],
) -> Interface:
    """Add adapters to the outputs of linear layers; the weights stay as they are.

    Args:
        edits: of the graph, which is changed in place.
        mode: "swappable" or "bank"; "unmerged" for constants in place of inputs.
        bundles: adapter name -> bundle, bound; one, but for a bank.
        sites: layer -> its float weights.
        quantised: layer -> its quantised sites.
        places: of the saved tensors, for swappable and bank.

    Returns:
        The adapter inputs (or constants).

    Raises:
        UsageError: several bundles that are no bank, an opset below 18, or layers that nothing can
            be added to: all of them listed.
    """
    import onnx_ir as ir

    source = edits.source
    if mode != BANK and len(bundles) > 1:
        raise UsageError(
            f"mode {mode}" + (" of a quantised model" if quantised else ""),
            expected="one adapter",
            found=f"{len(bundles)}",
            remedy="use --mode bank for several, each for rows of its own",
        )
    if source.opset < SIDE_OPSET:
        raise UsageError(
            source.path,
            expected=f"opset {SIDE_OPSET} or newer for an adapter beside the weights",
            found=f"opset {source.opset}",
            remedy="quantise or export the base again at a newer opset",
        )
    if mode == BANK:
        batch_of(source.model)
    fill_shapes(source.model)
    ends = _ends(source, sites, quantised)
    saved, base = saved_sites(edits, places)
    interface = Interface(
        group_layers([*bundles.values()]),
        tuple(Saved(name, array.shape, array.dtype.name) for name, array in base.items()),
        base_fingerprints(source, bundles, sites, quantised),
    )
    feeds = [full_feeds(interface, bundle, base) for bundle in bundles.values()]
    if mode == BANK:
        write_bank(source.model, ends, interface, table(interface.groups, feeds), saved, base)
        return interface
    write_swappable(source.model, ends, interface, feeds[0], saved, base)
    if mode == UNMERGED:
        for value in [v for v in source.model.graph.inputs if v.name in feeds[0]]:
            source.model.graph.inputs.remove(value)
            # Sizes that were symbolic are those of the constant.
            if value.const_value is not None:
                value.shape = ir.Shape(value.const_value.shape.numpy())
    return interface


def _ends(
    source: Source,
    sites: Mapping[str, Sequence[Site]],
    quantised: Mapping[str, Sequence[Site]],
) -> dict[str, list[Ends]]:
    """Where each layer's x comes in and its y goes out; packed outputs are split."""
    outputs: dict[str, list[Outputs]] = {}
    offenders = []
    for layer, several in sites.items():
        for site in several:
            why = _obstacle(source, site)
            if why:
                offenders.append(f"{layer}: {why}")
                continue
            total = site.outputs
            start = site.start or 0
            part = None if site.start is None else slice(start, start + site.shape[0])
            outputs.setdefault(layer, []).extend(
                Outputs((use.linear, 0), use.linear.outputs[0], total, part) for use in site.uses
            )
    if offenders:
        raise UsageError(
            source.path,
            expected="layers that are a MatMul or Gemm of the main graph each",
            found=f"{len(offenders)} others",
            remedy="adapt these layers before the others are quantised"
            if quantised
            else "use mode merged or unmerged",
            offenders=offenders,
        )
    for layer, there in quantised.items():
        outputs[layer] = [
            Outputs(fed, y, one.outputs, None if one.start is None else one.rows)
            for one in there
            for fed, y in one.products
        ]
    return ends_of(source.model.graph, outputs)


def _obstacle(source: Source, site: Site) -> str | None:
    """Why nothing can be added to the output of this layer."""
    for use in site.uses:
        node = use.linear
        if node.graph is not source.model.graph:
            return f"its {node.op_type} is in a subgraph or function, which sees no adapter"
        turned = "transA" in node.attributes and node.attributes["transA"].as_int()
        first = source_of(node.inputs[0]) is site.value
        if node.op_type not in ("MatMul", "Gemm") or turned or first:
            return f"{site.name} is used by {node.op_type} in another way than x W"
    return None if site.uses else f"{site.name} is used by no MatMul or Gemm"


def saved_sites(
    edits: Edits, places: Mapping[str, Place]
) -> tuple[list[SavedSite], dict[str, Array]]:
    """The saved tensors as places of their own, and the base's values there."""
    sites, base = [], {}
    for name, place in places.items():
        tensor = constant_of(place.value)
        if tensor is None:
            raise ValueError(f"{place.value.name} is no constant")
        array = edits.source.read(tensor)
        base[name] = array.T if place.transposed else array
        value = edits.own(place.value, place.uses)
        sites.append(SavedSite(name, value, place.transposed))
    return sites, base


def base_fingerprints(
    source: Source,
    bundles: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    quantised: Mapping[str, Sequence[Site]] | None = None,
) -> dict[str, Fingerprint]:
    """The base weights' fingerprints, by which adapters that come later are checked.

    An adapter's own where it was trained on the graph's weight (in any precision), else that of the
    graph's weight: an adapter let in in spite of its base must not vouch for others. None for
    quantised weights that no adapter was trained on.
    """
    specs: dict[str, list[LayerSpec]] = {}
    for bundle in bundles.values():
        for layer in bundle.layers:
            specs.setdefault(layer.name, []).append(layer)
    prints = {}
    for name, several in sites.items():
        tensor = constant_of(several[0].value)
        if tensor is None:
            continue
        weight = part_of(
            source.read(tensor), several[0].transposed, several[0].start, several[0].shape[0]
        )
        transposed = any(layer.fan_in_fan_out for layer in specs.get(name, ()))
        there = fingerprint(weight if several[0].transposed == transposed else weight.T)
        own = [layer.fingerprint for layer in specs.get(name, ()) if layer.fingerprint is not None]
        prints[name] = next((one for one in own if judge(one, there) != "different"), there)
    for name, parts in (quantised or {}).items():
        for layer in specs.get(name, ()):
            want = Wanted(name, layer.shape, layer.fan_in_fan_out, layer.fingerprint)
            if layer.fingerprint and all(
                verdict(source, one, want) != "different" for one in parts
            ):
                prints.setdefault(name, layer.fingerprint)
    return prints
