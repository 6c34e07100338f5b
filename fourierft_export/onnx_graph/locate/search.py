"""Finds an adapter's layers in a graph, also within model-local functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...bundle.file import Bundle
from ..graph.inline import functions_with_constants, inline_chosen
from ..graph.source import Source
from .candidates import FLOATS, may_hold
from .finder import Finder, Found
from .module_names import parse_mapped
from .saved import missing_saved
from .site import Wanted

if TYPE_CHECKING:
    import onnx_ir as ir


def find_layers(
    source: Source,
    wanted: Sequence[Wanted],
    mapping: Mapping[str, str],
    bundles: Mapping[str, Bundle],
    *,
    in_main_graph: bool,
) -> tuple[Finder, Found, tuple[str, ...]]:
    """Find layers; functions that hold weights which the graph itself lacks are expanded.

    Args:
        source: the graph; functions are expanded in place.
        wanted, mapping: as in `Finder.find`.
        bundles: whose saved tensors are looked for, too.
        in_main_graph: also expand functions that hold the layers' products, not only weights.

    Returns:
        The finder of the changed graph, what it found, and notes on the functions expanded.
    """
    finder = Finder(source)
    found = finder.find(wanted, mapping)
    functions = _in_functions(finder, found, wanted, mapping, bundles)
    if in_main_graph:
        nodes = {
            id(use.linear) for each in found.sites.values() for one in each for use in one.uses
        }
        functions |= {
            identifier
            for identifier, function in source.model.functions.items()
            if any(id(node) in nodes for node in function.all_nodes())
        }
    if not functions:
        return finder, found, ()
    names = inline_chosen(source.model, functions, source.path)
    finder = Finder(source)
    note = f"functions expanded, which hold layers of the adapter: {', '.join(names)}"
    return finder, finder.find(wanted, mapping), (note,)


def _in_functions(
    finder: Finder,
    found: Found,
    wanted: Sequence[Wanted],
    mapping: Mapping[str, str],
    bundles: Mapping[str, Bundle],
) -> set[ir.OperatorIdentifier]:
    """The functions with constants that may be layers or tensors which were not found."""
    model = finder.source.model
    if not model.functions:
        return set()
    missing = [want for want in wanted if want.name in found.missing]
    named = {parse_mapped(mapping[want.name])[0] for want in missing if want.name in mapping}
    saved = set(missing_saved(finder, found.bridge, bundles).values())
    saved |= {shape[::-1] for shape in saved}

    def fits(name: str, tensor: ir.TensorProtocol) -> bool:
        shape = tuple(int(size) for size in tensor.shape.numpy())
        is_float = tensor.dtype.name in FLOATS
        if name in named or (is_float and shape in saved):
            return True
        if not is_float:  # perhaps a quantised layer's integers
            return bool(missing) and len(shape) > 1
        return len(shape) == 2 and any(may_hold(shape, want) for want in missing)

    return functions_with_constants(model, fits)
