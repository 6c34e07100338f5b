"""Where the weights of an adapter's layers are in a graph that somebody else made.

In this order: what the caller says; the weight's name; the scope or name of the node that uses it;
the name of the bias beside it; its content, compared with the fingerprint of the base weight in
both orientations. Never by shape alone: square layers make that unsafe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ...models.names import Bridge, find_bridge
from ..graph.source import Source, constant_of, constants
from .consumers import Use, linear_uses, same_module, same_path, scope_of_weight
from .content import Match, matches, verdict
from .found import Candidate, Found, Wanted
from .packed import packed_in, packed_paths, parse_mapped, start_in, unknown_size
from .site import Site

if TYPE_CHECKING:
    import onnx_ir as ir

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
_SHOWN = 6


class Finder:
    """Finds layers in one graph.

    Args:
        source: the open file.
        more_paths: module paths that other evidence of the graph names (quantised layers), which
            count when names are bridged.
    """

    def __init__(self, source: Source, more_paths: Iterable[str] = ()) -> None:
        self.source = source
        self.candidates = list(_candidates(source))
        self.by_name = {one.name: one for one in self.candidates}
        self.lookups: dict[str, dict[str, list[tuple[Candidate, tuple[Use, ...]]]]] = {
            kind: {} for kind in ("name", "scope", "bias")
        }
        for one in self.candidates:
            path = scope_of_weight(one.name)
            if path:
                self._note("name", path, one, _belonging(one.uses, path))
            for kind in ("scope", "bias"):
                for path in {getattr(use, kind) for use in one.uses} - {None}:
                    uses = tuple(use for use in one.uses if getattr(use, kind) == path)
                    self._note(kind, path, one, uses)
        self.paths = {path for lookup in self.lookups.values() for path in lookup}
        self.paths |= {same_path(path) for path in more_paths}
        self.paths |= {part for path in tuple(self.paths) for part in packed_paths(path)}

    def _note(self, kind: str, path: str, one: Candidate, uses: tuple[Use, ...]) -> None:
        self.lookups[kind].setdefault(same_path(path), []).append((one, uses))

    def bridge(self, names: Iterable[str]) -> Bridge:
        """The prefix difference between an adapter's paths and the graph's."""
        roots = {path.split(".")[0] for path in self.paths}
        return find_bridge(names, roots, lambda path: same_path(path) in self.paths)

    def find(self, wanted: Sequence[Wanted], mapping: Mapping[str, str]) -> Found:
        """The sites of every layer; what is not found, or not beyond doubt, is in `missing`.

        Args:
            wanted: the layers.
            mapping: layer -> initializer, or `initializer[start:stop]` for a part of a packed
                weight (columns of its outputs), as the caller says.
        """
        found = Found(bridge=self.bridge(one.name for one in wanted))
        sizes = sorted({one.shape[0] for one in wanted if one.shape})
        for want in wanted:
            result: list[Site] | str | None
            if want.name in mapping:
                result = self._mapped(want, mapping[want.name])
            else:
                result = self.by_path(want, found.bridge)
            if result is None:
                result = self._by_content(want, sizes)
            if isinstance(result, str):
                found.missing[want.name] = result
            else:
                found.sites[want.name] = result
        _refuse_double_claims(found)
        return found

    def linear_at(self, path: str) -> ir.Node | None:
        """The linear node of a module, by its path in the graph's language."""
        for lookup in self.lookups.values():
            for _, uses in lookup.get(path, []):
                if uses:
                    return uses[0].linear
        return None

    def _mapped(self, want: Wanted, text: str) -> list[Site] | str:
        name, part = parse_mapped(text)
        one = self.by_name.get(name)
        if one is None:
            return f"--map names {name}, {self._other(name)}"
        return self._site(want, one, one.uses, "map", part=part)

    def _other(self, name: str) -> str:
        """What a constant is that is no matrix of floats."""
        constant = next((v for v in constants(self.source.model) if v.name == name), None)
        tensor = None if constant is None else constant_of(constant)
        if constant is None or tensor is None:
            return "which is no constant of the graph"
        kind = f"which is {tensor.dtype.name} {list(tensor.shape.numpy())}"
        users = [node for node, _ in constant.uses()]
        inner = any(node.graph is not self.source.model.graph for node in users)
        used = ", ".join(sorted({node.op_type for node in users})) or "nothing"
        where = " in a subgraph or function" if inner else ""
        return (
            f"{kind}, used by {used}{where}: neither a matrix of floats, nor the integers of a "
            "MatMulNBits, QDQ or dynamic int8 layer of the main graph"
        )

    def by_path(self, want: Wanted, bridge: Bridge) -> list[Site] | str | None:
        """The layer's sites by name, scope or bias; why they do not fit; None if there is none."""
        path = same_path(bridge.to_base(want.name))
        for kind, lookup in self.lookups.items():
            hits = lookup.get(path, [])
            results = [self._site(want, one, uses, kind) for one, uses in hits]
            good = [site for result in results if not isinstance(result, str) for site in result]
            fits = [site for site in good if site.verdict != "different"]
            if len(hits) > 1 and len({site.name for site in fits or good}) > 1:
                if not all(site.verdict for site in fits) or not fits:
                    listed = ", ".join(site.describe() for site in good[:_SHOWN])
                    return f"several weights at this path: {listed}"
                return fits
            if good:
                return fits or good
            if results:
                return str(results[0])
        return self._packed(want, path)

    def _packed(self, want: Wanted, path: str) -> list[Site] | str | None:
        """The layer's part of what its name is packed in, unless its content is another's."""
        place = packed_in(path)
        whole = place[0] if place else ""
        hits = [hit for lookup in self.lookups.values() for hit in lookup.get(whole, [])]
        if place is None or not hits:
            return None
        one, uses = hits[0]
        layouts = {use.transposed for use in uses}
        if want.shape is None:
            return unknown_size(want.name, one.name, one.describe())
        if len({hit.name for hit, _ in hits}) > 1 or len(layouts) != 1:
            return None
        start = start_in(place[1], want.shape[0], one.shape[1 if True in layouts else 0])
        if start is None:
            return None
        sites = self._site(want, one, uses, "name", part=(start, start + want.shape[0]))
        # The order is a convention only: the content tells better.
        doubtful = isinstance(sites, str) or "different" in {site.verdict for site in sites}
        return None if doubtful else sites

    def _by_content(self, want: Wanted, sizes: Sequence[int]) -> list[Site] | str:
        if want.fingerprint is None or want.shape is None:
            return self._hint(want, "no weight of this name or path")
        hits = [
            (one, match)
            for one in self.candidates
            for match in matches(self.source, one.value, one.shape, want, sizes)
        ]
        if len(hits) > 1:  # one constant may match in both orientations, if it is symmetric
            straight = [
                (one, match)
                for one, match in hits
                if {use.transposed for use in one.uses} == {match.transposed}
            ]
            hits = straight if len({(o.name, m.start) for o, m in hits}) == 1 else hits
        if len(hits) == 1:
            one, match = hits[0]
            return self._site(want, one, one.uses, "content", match=match)
        if hits:
            listed = ", ".join(one.describe() for one, _ in hits[:_SHOWN])
            return f"several weights have its content: {listed}"
        return self._hint(want, "no weight of this name, path or content")

    def _hint(self, want: Wanted, why: str) -> str:
        """`why`, with the constants whose size fits."""
        sizes = sorted(want.shape) if want.shape else None
        fit = [c for c in self.candidates if c.uses and (not sizes or sorted(c.shape) == sizes)]
        if not fit:
            return f"{why}, nor any of its size"
        listed = ", ".join(one.describe() for one in fit[:_SHOWN])
        more = f" and {len(fit) - _SHOWN} more" if len(fit) > _SHOWN else ""
        return f"{why}; candidates: {listed}{more}"

    def _site(
        self,
        want: Wanted,
        one: Candidate,
        uses: tuple[Use, ...],
        how: str,
        *,
        part: tuple[int, int] | None = None,
        match: Match | None = None,
    ) -> list[Site] | str:
        """The site that this constant is for the layer, or why it cannot be."""
        layouts = {use.transposed for use in uses}
        if match is not None:
            layouts = {match.transposed}
            if match.start is not None and want.shape is not None:
                part = (match.start, match.start + want.shape[0])
        if not layouts and want.shape and want.shape[0] != want.shape[1]:
            layouts = {one.shape != want.shape}  # its name is known: only the layout is open
        if len(layouts) != 1:
            return f"{one.describe()} is used in both orientations, or in none that is known"
        transposed = layouts.pop()
        outputs, inputs = reversed(one.shape) if transposed else one.shape
        if part is not None:
            if not part[0] < part[1] <= outputs:
                return f"{one.describe()} has no outputs {part[0]} to {part[1]}"
            whole = part == (0, outputs)
            outputs, part = part[1] - part[0], None if whole else part
        if want.shape is not None and (outputs, inputs) != want.shape:
            return (
                f"shape {list(want.shape)} expected, {one.describe()} holds {[outputs, inputs]}"
                + (" as (in, out)" if transposed else "")
            )
        start = part[0] if part else None
        answer = verdict(
            self.source, constant_of(one.value), transposed, start, (outputs, inputs), want
        )
        return [
            Site(
                want.name,
                one.value,
                (outputs, inputs),
                transposed,
                uses,
                start,
                shared=len(uses) < len(tuple(one.value.uses())) or one.value.is_graph_output(),
                how=how,
                verdict=answer,
            )
        ]


def _belonging(uses: tuple[Use, ...], path: str) -> tuple[Use, ...]:
    """The uses that are the module's own; all, if none tells whose it is."""
    mine = tuple(use for use in uses if use.path is None or same_module(use.path, path))
    return mine or uses


def _candidates(source: Source) -> Iterator[Candidate]:
    for value in constants(source.model):
        tensor = constant_of(value)
        if tensor is None or tensor.dtype.name not in FLOATS or len(tensor.shape) != 2:
            continue
        if not value.uses():
            continue
        rows, columns = (int(size) for size in tensor.shape.numpy())
        uses = tuple(linear_uses(source.model, value))
        yield Candidate(value, (rows, columns), uses)


def _refuse_double_claims(found: Found) -> None:
    """Two layers cannot be the same outputs of the same use of a constant."""
    claims: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    for layer, sites in list(found.sites.items()):
        for site in sites:
            start = site.start or 0
            part = start, start + site.shape[0], layer
            for use in site.uses:
                others = claims.setdefault((id(use.node), use.index), [])
                for first, last, other in others:
                    if other != layer and first < part[1] and part[0] < last:
                        why = f"{site.describe()} is found for {other}, too"
                        found.missing[layer] = why
                        found.sites.pop(layer, None)
                others.append(part)
