"""Finds an adapter's dense tensors (heads, biases) in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...bundle.bundle import Bundle
from ...errors import BaseMismatchError
from ...models.adapter_names_in_base import Bridge
from ..graph.source import constant_of, constant_shape
from .finder import Finder
from .site import Wanted
from .weight_uses import find_bias, may_belong_to

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Place:
    """The constant that a dense tensor replaces, and its consumers that get the new content."""

    value: ir.Value
    uses: tuple[tuple[ir.Node, int], ...]
    transposed: bool = False  # the graph holds the transpose


def find_saved(finder: Finder, bridge: Bridge, bundles: Mapping[str, Bundle]) -> dict[str, Place]:
    """Find the constants that the adapters' dense tensors replace, or list what does not fit."""
    places = {key: _find(finder, bridge.to_base(key), s) for key, s in _shapes(bundles).items()}
    offenders = [f"{key}: {why}" for key, why in places.items() if isinstance(why, str)]
    if offenders:
        raise BaseMismatchError(
            finder.source.path,
            expected="a graph with the heads and biases of the adapter",
            found=f"{len(offenders)} tensors that it lacks or has in another shape",
            remedy="export the base with its head from PyTorch, or use an adapter without one",
            offenders=offenders,
        )
    return {key: place for key, place in places.items() if not isinstance(place, str)}


def missing_saved(finder: Finder, bridge: Bridge, bundles: Mapping[str, Bundle]) -> set[str]:
    """The adapters' dense tensors that the graph lacks."""
    shapes = _shapes(bundles).items()
    return {k for k, shape in shapes if isinstance(_find(finder, bridge.to_base(k), shape), str)}


def _shapes(bundles: Mapping[str, Bundle]) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for bundle in bundles.values() for key, array in bundle.saved.items()}


def _find(finder: Finder, name: str, shape: tuple[int, ...]) -> Place | str:
    """The place of a tensor, by its name in the graph, or why there is none."""
    module, _, kind = name.rpartition(".")
    if kind == "weight" and len(shape) == 2:
        result = finder.by_path(Wanted(module, (shape[0], shape[1])), Bridge())
        if isinstance(result, str):
            return result
        if result and result[0].quantised:
            return f"the graph's {result[0].name} is quantised"
        if result:
            site = result[0]
            uses = tuple((use.node, use.index) for use in site.uses)
            # An embedding has no such uses: its name means the table itself.
            return Place(site.value, uses or tuple(site.value.uses()), site.transposed)
    value = finder.source.model.graph.initializers.get(name)
    if value is not None and value.const_value is not None:
        mine = tuple((node, index) for node, index in value.uses() if may_belong_to(node, module))
        return _fitting(Place(value, mine or tuple(value.uses())), shape)
    linear = finder.linear_at(module) if kind == "bias" else None
    bias = find_bias(linear) if linear is not None else None
    added = bias[0].inputs[bias[1]] if bias else None
    if bias is None or added is None or constant_of(added) is None:
        return "no such tensor in the graph"
    return _fitting(Place(added, (bias,)), shape)


def _fitting(place: Place, shape: tuple[int, ...]) -> Place | str:
    tensor, found = constant_of(place.value), constant_shape(place.value)
    if found != shape:
        return f"shape {list(shape)} expected, the graph's {place.value.name} has {list(found)}"
    if tensor is None or tensor.dtype.name not in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"):
        return f"the graph's {place.value.name} is quantised"
    return place
