"""Which quantised linear layers are an adapter's, whole or packed with others.

In the order of the float search: what the caller says; the module path; the path of what the layer
is packed in by its name; the dequantised content, within a quantisation step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np

from ...bundle.fingerprint import SAMPLE_RTOL, sample_positions
from ...models.names import Bridge
from ...types import Array
from .consumers import same_path
from .content import starts
from .found import Wanted
from .packed import packed_in, parse_mapped, start_in, unknown_size
from .quantised import QuantisedLinear
from .site import Site

_SHOWN = 6


@dataclass
class QuantisedFound:
    """What the search gave.

    Attributes:
        sites: layer -> where it is.
        missing: layer -> why it is not beyond doubt among the quantised ones.
        hints: layer of which there is nothing else to say -> the quantised ones that may hold it.
    """

    sites: dict[str, list[Site]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=dict)


def find_quantised(
    linears: Sequence[QuantisedLinear],
    wanted: Iterable[Wanted],
    bridge: Bridge,
    mapping: Mapping[str, str],
    sizes: Sequence[int],
) -> QuantisedFound:
    """The layers that are among `linears`.

    Args:
        linears: of the graph.
        wanted: layers that have no float weight in it.
        bridge: from the adapter's paths to the graph's.
        mapping: layer -> name of a constant of integers, perhaps with a range of outputs.
        sizes: numbers of outputs of the adapter's layers, of which packed weights are made.
    """
    found = QuantisedFound()
    unknown: list[Wanted] = []
    for want in wanted:
        told = want.name in mapping
        if told:
            result = _mapped(linears, want, mapping[want.name])
        else:
            result = _by_path(linears, want, same_path(bridge.to_base(want.name)))
        if isinstance(result, str):
            found.missing[want.name] = result
            continue
        if result:
            found.sites[want.name] = result = _judged(want, result)
            # The order in a packed weight is a convention only: its content tells better.
            if told or result[0].start is None or result[0].verdict != "different":
                continue
        if not told:
            unknown.append(want)
    for want, hits in _by_content(linears, unknown, sizes):
        if len({(one.name, one.start) for one in hits}) > 1:
            listed = ", ".join(one.describe() for one in hits[:_SHOWN])
            found.missing[want.name] = f"several quantised weights have its content: {listed}"
            found.sites.pop(want.name, None)
        elif hits:
            found.sites[want.name] = _judged(want, hits)
        elif want.name not in found.sites:
            fit = [_whole(one, want).describe() for one in linears if _may_hold(one, want)]
            if fit:
                found.hints[want.name] = ", ".join(fit[:_SHOWN])
    _refuse_double_claims(found)
    return found


def _judged(want: Wanted, sites: Sequence[Site]) -> list[Site]:
    return [replace(one, verdict=quantised_verdict(one, want)) for one in sites]


def _whole(linear: QuantisedLinear, want: Wanted) -> Site:
    return _site(linear, want, None, linear.shape)


def _site(
    linear: QuantisedLinear,
    want: Wanted,
    start: int | None,
    shape: tuple[int, int],
) -> Site:
    """The layer at a linear node, from its output `start` on where several are packed."""
    node, index = linear.integers
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{linear.weight} is no input of {node.op_type}")
    return Site(want.name, value, shape, linear.transposed, start=start, quantised=linear)


def quantised_verdict(
    site: Site, want: Wanted, content: tuple[Array, Array] | None = None
) -> str | None:
    """What the fingerprint says of a quantised layer: "precision", "different", or None without.

    Args:
        site: the layer.
        want: what it shall be.
        content: what `dequantised` of the linear node gave, if it was called already.
    """
    linear = site.quantised
    if want.fingerprint is None or linear is None or linear.dequantised is None:
        return None
    if want.shape is not None and want.shape != site.shape:
        return "different"
    weight, step = content or linear.dequantised()
    outputs, inputs = site.shape
    at = sample_positions(outputs * inputs)
    if want.transposed:
        into, out = np.unravel_index(at, (inputs, outputs))
    else:
        out, into = np.unravel_index(at, (outputs, inputs))
    out = out + site.rows.start
    expected = np.frombuffer(want.fingerprint.samples, "<u2").view(ml_dtypes.bfloat16)
    exact = expected.astype(np.float64)
    error = np.abs(weight[out, into] - exact)
    # The largest value of a block may be clipped by up to a step.
    fits = error <= step[out, into] * 1.01 + SAMPLE_RTOL * np.abs(exact)
    return "precision" if fits.all() else "different"


def _mapped(linears: Sequence[QuantisedLinear], want: Wanted, text: str) -> list[Site] | str:
    """What the caller says; nothing if that is no quantised weight."""
    name, part = parse_mapped(text)
    sites = []
    for one in linears:
        if one.weight != name:
            continue
        outputs, inputs = one.shape
        first, last = part or (0, outputs)
        if not first < last <= outputs:
            return f"{_whole(one, want).describe()} has no outputs {first} to {last}"
        shape = last - first, inputs
        if want.shape is not None and want.shape != shape:
            hint = "" if part or want.shape[1] != inputs else f"; say which: {name}[START:STOP]"
            return (
                f"shape {list(want.shape)} expected, {text} ({one.kind}) holds {list(shape)}{hint}"
            )
        sites.append(_site(one, want, None if shape == one.shape else first, shape))
    return sites


def _by_path(linears: Sequence[QuantisedLinear], want: Wanted, path: str) -> list[Site] | str:
    """The layers of a module path, or the parts of what its name is packed in."""
    hits = [_whole(one, want) for one in linears if path in map(same_path, one.paths)]
    place = packed_in(path)
    if hits or place is None:
        return hits
    packed = [one for one in linears if place[0] in map(same_path, one.paths)]
    if packed and want.shape is None:
        return unknown_size(want.name, packed[0].weight, _whole(packed[0], want).describe())
    for one in packed:
        if want.shape is not None and want.shape[1] == one.shape[1]:
            start = start_in(place[1], want.shape[0], one.shape[0])
            hits += [] if start is None else [_site(one, want, start, want.shape)]
    return hits


def _by_content(
    linears: Sequence[QuantisedLinear], wanted: Sequence[Wanted], sizes: Sequence[int]
) -> list[tuple[Wanted, list[Site]]]:
    """Per layer the sites with its content, those that are packed only if there are no others."""
    hits: dict[str, list[Site]] = {want.name: [] for want in wanted}
    for one in linears:
        fit = [want for want in wanted if want.fingerprint and _may_hold(one, want)]
        if not fit or one.dequantised is None:
            continue
        content = one.dequantised()
        for want in fit:
            if want.shape is None:
                continue
            for start in starts(one.shape[0], want.shape[0], sizes):
                part = None if want.shape == one.shape else start
                site = _site(one, want, part, want.shape)
                if quantised_verdict(site, want, content) == "precision":
                    hits[want.name].append(site)
    alone = {name: [one for one in sites if one.start is None] for name, sites in hits.items()}
    return [(want, alone[want.name] or hits[want.name]) for want in wanted]


def _may_hold(linear: QuantisedLinear, want: Wanted) -> bool:
    if want.shape is None:
        return True
    return linear.shape[1] == want.shape[1] and linear.shape[0] >= want.shape[0]


def _refuse_double_claims(found: QuantisedFound) -> None:
    """Two layers cannot be the same outputs of one node."""
    claims: dict[int, list[tuple[slice, str]]] = {}
    for layer, sites in list(found.sites.items()):
        for one in sites:
            others = claims.setdefault(id(one.quantised), [])
            for rows, other in others:
                if rows.start < one.rows.stop and one.rows.start < rows.stop:
                    found.missing[layer] = f"{one.describe()} is found for {other}, too"
                    found.sites.pop(layer, None)
            others.append((one.rows, layer))
