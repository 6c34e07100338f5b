"""Finds the weights of an adapter's layers in a graph.

Evidence is tried in this order: the caller's mapping; the weight's name; the scope or name of the
node that uses it; the name of the bias that is added; its content, compared with the fingerprint of
the base weight in both orientations. Never the shape alone: square layers make that unsafe.
Quantised weights are found in the same way, and several layers may be packed in one weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...models.adapter_names_in_base import Bridge, find_bridge
from ..graph.source import Source, constant_of, constant_shape, constants
from .candidates import describe_sites, list_candidates, make_site, may_hold
from .module_names import (
    module_of_weight,
    packed_in,
    packed_modules,
    parse_mapped,
    same_module,
    same_path,
)
from .quantised import find_quantised_linears, list_unsupported
from .site import Site, Wanted, match_constant
from .weight_uses import Use, describe_users

if TYPE_CHECKING:
    import onnx_ir as ir

Hit = tuple[Site, tuple[Use, ...]]  # a constant, and its uses that are one module


@dataclass
class Found:
    """Each layer's sites, several where the graph holds the weight more than once, or why none.

    `bridge` goes from the adapter's paths to the graph's.
    """

    sites: dict[str, list[Site]] = field(default_factory=dict)
    bridge: Bridge = field(default_factory=Bridge)
    missing: dict[str, str] = field(default_factory=dict)


class Finder:
    """Finds layers in one graph."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.linears = find_quantised_linears(source)
        self._candidates = list(list_candidates(source, self.linears))
        # By names, scopes and biases: module path -> (constant, the uses that it is about).
        self._lookups: list[dict[str, list[Hit]]] = [{}, {}, {}]
        for one in self._candidates:
            path = module_of_weight(one.name)
            if path:
                own = tuple(u for u in one.uses if u.path is None or same_module(u.path, path))
                self._note(0, path, one, own or one.uses)
            for number, kind in enumerate(("scope", "bias"), 1):
                for path in {getattr(use, kind) for use in one.uses} - {None}:
                    uses = tuple(use for use in one.uses if getattr(use, kind) == path)
                    self._note(number, path, one, uses)
        # At last a weight with exactly the layer's name, which ends in no word for a weight.
        self._named = {one.name: [(one, one.uses)] for one in self._candidates if one.uses}
        self._paths = {path for lookup in self._lookups for path in lookup}
        for path in tuple(self._paths):
            self._paths |= {*packed_modules(path), (packed_in(path) or (path, 0))[0]}

    def _note(self, number: int, path: str, one: Site, uses: tuple[Use, ...]) -> None:
        self._lookups[number].setdefault(same_path(path), []).append((one, uses))

    def find(self, wanted: Sequence[Wanted], mapping: Mapping[str, str]) -> Found:
        """Find the sites of every layer; one without, or with several candidates, is in `missing`.

        `mapping` names a layer's constant, or `constant[start:stop]` (outputs) in a packed one.
        """
        found = Found(bridge=self.bridge(one.name for one in wanted))
        unknown = []
        taken = {same_path(found.bridge.to_base(want.name)) for want in wanted}
        for want in wanted:
            if want.name in mapping:
                result = self._mapped(want, mapping[want.name])
            else:
                result = self.by_path(want, found.bridge, taken)
                result = result or self._packed(want, found.bridge)
            if isinstance(result, str):
                found.missing[want.name] = result
                continue
            if result:
                found.sites[want.name] = result
            # The order in a packed weight is a convention only: its content is better evidence.
            guessed = bool(result) and result[0].start is not None and want.name not in mapping
            if not result or (guessed and result[0].verdict == "different"):
                unknown.append(want)
        for want, hits in self._by_content(unknown, [w.shape[0] for w in wanted if w.shape]):
            if isinstance(hits, str):
                found.sites.pop(want.name, None)
                found.missing[want.name] = hits
            elif hits:
                found.sites[want.name] = hits
            elif want.name not in found.sites:
                found.missing[want.name] = self._hint(want)
        _refuse_double_claims(found)
        return found

    def bridge(self, names: Iterable[str]) -> Bridge:
        """The prefix difference between an adapter's paths and the graph's."""
        roots = {path.split(".")[0] for path in self._paths}
        return find_bridge(names, roots, lambda path: same_path(path) in self._paths)

    def linear_at(self, path: str) -> ir.Node | None:
        """The linear node of a module, by its path in the graph's language."""
        return next((uses[0].linear for _, uses in self._hits(same_path(path)) if uses), None)

    def by_path(self, want: Wanted, bridge: Bridge, taken: Container[str] = ()) -> list[Site] | str:
        """The layer's sites by name, scope or bias; none; or why those do not fit.

        `taken` are the paths of the layers that are looked for, in the graph's spelling.
        """
        path = same_path(bridge.to_base(want.name))
        for lookup in (*self._lookups, {path: self._named.get(want.name, [])}):
            hits = self._with_other_calls(path, lookup.get(path, []), taken)
            results = [make_site(self.source, want, one, uses) for one, uses in hits]
            good = [site for site in results if not isinstance(site, str)]
            fits = [site for site in good if site.verdict != "different"]
            several = len({site.name for site in fits or good}) > 1
            if several and not (fits and all(site.verdict for site in fits)):
                return f"several weights at this path: {describe_sites(good)}"
            if results:
                return fits or good or str(results[0])
        return []

    def _with_other_calls(
        self, path: str, hits: Sequence[Hit], taken: Container[str]
    ) -> Sequence[Hit]:
        """The hits of a layer, with those of its second and further calls.

        TorchScript names these `query_1`, `query_2`, and may give each a copy of the weight.
        """
        found = {id(one): (one, uses) for one, uses in hits}
        calls = (f"{path}_{number}" for number in itertools.count(1))
        for call in itertools.takewhile(lambda one: one in self._lookups[1], calls if hits else ()):
            for one, uses in () if call in taken else self._lookups[1][call]:
                if id(one) in found or self._are_equal(hits[0][0], one):
                    known = found.get(id(one), (one, ()))[1]
                    found[id(one)] = one, tuple(dict.fromkeys((*known, *uses)))
        return list(found.values())

    def _are_equal(self, first: Site, other: Site) -> bool:
        if first.quantised or other.quantised or first.shape != other.shape:
            return False
        one, two = (self.source.read_constant(site.value) for site in (first, other))
        return np.array_equal(one, two)

    def has(self, path: str) -> bool:
        """Whether a constant is found at this path."""
        return bool(self._hits(path))

    def parts_at(self, path: str) -> list[Site]:
        """The constants at a path, as sites of no layer."""
        return list(dict.fromkeys(one for one, _ in self._hits(path)))

    def constants_named(self, name: str) -> list[Site]:
        """The constants of this name that may hold layers, as sites of no layer."""
        return [one for one in self._candidates if one.name == name]

    def _hits(self, path: str) -> list[Hit]:
        return [hit for lookup in self._lookups for hit in lookup.get(path, [])]

    def _mapped(self, want: Wanted, text: str) -> list[Site] | str:
        """The sites in the constant that the caller named, or why it has none."""
        name, part = parse_mapped(text)
        sites = []
        for one in self.constants_named(name):
            site = make_site(self.source, want, one, one.uses, part=part)
            if isinstance(site, str):
                return site
            sites.append(site)
        return sites or f"--map names {name}, {self._other(name)}"

    def _other(self, name: str) -> str:
        """Describe a constant that cannot hold a layer."""
        value = next((v for v in constants(self.source.model) if v.name == name), None)
        tensor = constant_of(value)
        if value is None or tensor is None:
            return "which is no constant of the graph"
        return (
            f"which is {tensor.dtype.name} {list(constant_shape(value))}, used by "
            f"{describe_users(value)}: neither a matrix of floats, nor the integers of a quantised "
            "layer of the main graph"
        )

    def _packed(self, want: Wanted, bridge: Bridge) -> list[Site] | str:
        """The layer's part of the weight it is packed in; all parts but the first have one size."""
        whole, from_end = packed_in(same_path(bridge.to_base(want.name))) or ("", 0)
        sites: list[Site] = []
        hits = self._hits(whole) if whole else []
        if hits and want.shape is None:
            one = hits[0][0]
            return (
                f"packed in {one.describe()}, but the adapter does not record the layer's size: "
                f"give --base, or --map {want.name}={one.name}[START:STOP]"
            )
        if want.shape is None or len({one.name for one, _ in hits}) > 1:
            return []
        for one, uses in {id(one): (one, uses) for one, uses in reversed(hits)}.values():
            total = one.shape[1 if {use.transposed for use in uses} == {True} else 0]
            start = total - from_end * want.shape[0] if from_end else 0
            if start >= 0:
                part = start, start + want.shape[0]
                site = make_site(self.source, want, one, uses, part=part)
                sites += [] if isinstance(site, str) else [site]
        return sites

    def _by_content(
        self, wanted: Sequence[Wanted], sizes: Sequence[int]
    ) -> list[tuple[Wanted, list[Site] | str]]:
        """Per layer the sites with its content, or why they are ambiguous."""
        hits: dict[str, list[Site]] = {want.name: [] for want in wanted}
        for one in self._candidates:
            fit = [w for w in wanted if w.fingerprint and w.shape and may_hold(one.shape, w)]
            for want, transposed, part in match_constant(self.source, one, fit, sizes):
                site = make_site(self.source, want, one, one.uses, part=part, transposed=transposed)
                if not isinstance(site, str) and site.verdict != "different":
                    hits[want.name].append(site)
        return [(want, _unambiguous(hits[want.name])) for want in wanted]

    def _hint(self, want: Wanted) -> str:
        """Say that a layer was not found, and list the constants whose size fits."""
        by = "path or content" if want.fingerprint and want.shape else "or path"
        why = f"no weight of this name{',' if 'content' in by else ''} {by}"
        size = sorted(want.shape or ())
        fit = [
            one
            for one in self._candidates
            if one.uses
            and (may_hold(one.shape, want) if one.quantised else size in ([], sorted(one.shape)))
        ]
        why += (
            f"; candidates: {describe_sites(fit)}" if fit else ", nor any float weight of its size"
        )
        return why + "".join(f"; or in {kind}" for kind in list_unsupported(self.source))


def _unambiguous(hits: list[Site]) -> list[Site] | str:
    """The sites with a layer's content if they are one constant, or why they are not."""
    floats = [site for site in hits if not site.quantised]
    if len(floats) > 1:  # one constant may match in both orientations, if it is symmetric
        straight = [s for s in floats if {use.transposed for use in s.uses} == {s.transposed}]
        floats = straight if len({(s.name, s.start) for s in straight}) == 1 else floats
    # Within a quantisation step other parts of a packed weight may fit by chance.
    chosen = floats or [site for site in hits if site.start is None] or hits
    if len(floats) > 1 or len({(site.name, site.start) for site in chosen}) > 1:
        return f"several weights have its content: {describe_sites(chosen)}"
    return chosen


def _refuse_double_claims(found: Found) -> None:
    """Two layers cannot be the same outputs of the same use of a constant."""
    claims: dict[tuple[int, int], list[tuple[slice, str]]] = {}
    for layer, sites in list(found.sites.items()):
        for site in sites:
            for use in site.uses:
                others = claims.setdefault((id(use.node), use.index), [])
                for rows, other in others:
                    if (
                        other != layer
                        and rows.start < site.rows.stop
                        and site.rows.start < rows.stop
                    ):
                        found.missing[layer] = f"{site.describe()} is found for {other}, too"
                        found.sites.pop(layer, None)
                others.append((site.rows, layer))
