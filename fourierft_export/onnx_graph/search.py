"""The search of a graph for all that an adapter changes, also within model-local functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bundle.file import Bundle
from .graph.inline import holders, inline_some
from .graph.source import Source
from .locate.finder import FLOATS, Finder
from .locate.found import Found, Wanted
from .locate.packed import parse_mapped
from .locate.quantised import QuantisedLinear, all_paths
from .locate.quantised_forms import others, quantised_linears
from .locate.quantised_search import find_quantised
from .locate.saved import lacking

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Search:
    """What a search gave.

    Attributes:
        finder: of the graph as it is now.
        found: where the layers are.
        linears: the graph's quantised layers.
        notes: functions that were expanded.
    """

    finder: Finder
    found: Found
    linears: Sequence[QuantisedLinear]
    notes: tuple[str, ...] = ()


def search(
    source: Source,
    wanted: Sequence[Wanted],
    mapping: Mapping[str, str],
    bundles: Mapping[str, Bundle],
    *,
    beside: bool,
) -> Search:
    """Find layers; functions that hold what the graph itself does not are expanded first.

    Args:
        source: the graph; functions are expanded in place.
        wanted: the layers.
        mapping: layer -> constant, as the caller says.
        bundles: whose saved tensors are looked for, too.
        beside: the layers themselves are to be in the main graph, not only their weights.

    Raises:
        BadInputError: a function that would have to be expanded cannot be.
    """
    first = _once(source, wanted, mapping)
    functions = _in_functions(source, first, wanted, mapping, bundles)
    if beside:
        functions |= _with_layers(source, first.found)
    if not functions:
        return first
    names = inline_some(source.model, functions, source.path)
    note = f"functions expanded, which hold layers of the adapter: {', '.join(names)}"
    second = _once(source, wanted, mapping)
    return Search(second.finder, second.found, second.linears, (note,))


def _once(source: Source, wanted: Sequence[Wanted], mapping: Mapping[str, str]) -> Search:
    linears = quantised_linears(source)
    finder = Finder(source, all_paths(linears))
    found = finder.find(wanted, mapping)
    lost = [want for want in wanted if want.name in found.missing]
    sizes = sorted({want.shape[0] for want in wanted if want.shape})
    quantised = find_quantised(linears, lost, found.bridge, mapping, sizes)
    for layer, sites in quantised.sites.items():
        found.sites[layer] = sites
        del found.missing[layer]
    found.missing |= quantised.missing
    for layer, listed in quantised.hints.items():
        found.missing[layer] += f"; quantised ones that may hold it: {listed}"
    if found.missing:
        for kind in others(source):
            for layer in found.missing.keys() - quantised.missing.keys():
                found.missing[layer] += f"; or in {kind}"
    return Search(finder, found, linears)


def _in_functions(
    source: Source,
    first: Search,
    wanted: Sequence[Wanted],
    mapping: Mapping[str, str],
    bundles: Mapping[str, Bundle],
) -> set[ir.OperatorIdentifier]:
    """The functions that hold constants which may be what was not found."""
    if not source.model.functions:
        return set()
    missing = [want for want in wanted if want.name in first.found.missing]
    named = {parse_mapped(mapping[want.name])[0] for want in missing if want.name in mapping}
    saved = set(lacking(first.finder, first.found.bridge, bundles).values())
    saved |= {shape[::-1] for shape in saved}

    def fits(name: str, tensor: ir.TensorProtocol) -> bool:
        shape = tuple(int(size) for size in tensor.shape.numpy())
        is_float = tensor.dtype.name in FLOATS
        if name in named or (is_float and shape in saved):
            return True
        if not is_float:  # perhaps a quantised layer's integers
            return bool(missing) and len(shape) > 1
        return len(shape) == 2 and any(_may_hold(shape, want) for want in missing)

    return holders(source.model, fits)


def _may_hold(shape: tuple[int, ...], want: Wanted) -> bool:
    """Whether a matrix is as large as the layer, or as several that are packed."""
    if want.shape is None:
        return True
    outputs, inputs = want.shape
    return any(there[1] == inputs and there[0] >= outputs for there in (shape, shape[::-1]))


def _with_layers(source: Source, found: Found) -> set[ir.OperatorIdentifier]:
    """The functions whose nodes are layers that were found by what is fed to them."""
    nodes = {id(use.linear) for sites in found.sites.values() for one in sites for use in one.uses}
    return {
        identifier
        for identifier, function in source.model.functions.items()
        if any(id(node) in nodes for node in function.all_nodes())
    }
