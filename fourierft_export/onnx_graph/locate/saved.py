"""An adapter's dense tensors (heads, biases) in a graph that somebody else made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...bundle.file import Bundle
from ...errors import BaseMismatchError
from ...models.names import Bridge
from ..graph.source import constant_of
from .consumers import belongs, bias_of, same_path
from .finder import Finder
from .found import Wanted

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Place:
    """Where a dense tensor goes.

    Attributes:
        value: the constant.
        uses: its consumers that shall see the new content.
        transposed: the graph holds the transpose.
    """

    value: ir.Value
    uses: tuple[tuple[ir.Node, int], ...]
    transposed: bool = False


def find_saved(finder: Finder, bridge: Bridge, bundles: Mapping[str, Bundle]) -> dict[str, Place]:
    """Where the adapters' dense tensors go.

    Args:
        finder: of the graph.
        bridge: from the adapter's paths to the graph's.
        bundles: adapter name -> bundle.

    Raises:
        BaseMismatchError: listing the tensors that the graph lacks, or has in other shapes.
    """
    places, offenders = _search(finder, bridge, bundles)
    if offenders:
        raise BaseMismatchError(
            finder.source.path,
            expected="a graph with the heads and biases of the adapter",
            found=f"{len(offenders)} tensors that it does not have so",
            remedy="export the base with its head from PyTorch, or use an adapter without one",
            offenders=[f"{key}: {why}" for key, why in offenders.items()],
        )
    return places


def lacking(
    finder: Finder, bridge: Bridge, bundles: Mapping[str, Bundle]
) -> dict[str, tuple[int, ...]]:
    """The adapters' dense tensors that the graph does not have: name -> shape."""
    _, offenders = _search(finder, bridge, bundles)
    return {key: shape for key, shape in _shapes(bundles).items() if key in offenders}


def _shapes(bundles: Mapping[str, Bundle]) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for bundle in bundles.values() for key, array in bundle.saved.items()}


def _search(
    finder: Finder, bridge: Bridge, bundles: Mapping[str, Bundle]
) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors are; and why the others are nowhere."""
    places: dict[str, Place] = {}
    offenders: dict[str, str] = {}
    for key, shape in _shapes(bundles).items():
        place = _find(finder, bridge.to_base(key), shape)
        if isinstance(place, str):
            offenders[key] = place
        else:
            places[key] = place
    return places, offenders


def _find(finder: Finder, name: str, shape: tuple[int, ...]) -> Place | str:
    """Where a tensor of this name (in the graph's language) is, or why nowhere."""
    module, _, kind = name.rpartition(".")
    if kind == "weight" and len(shape) == 2:
        result = finder.by_path(Wanted(module, (shape[0], shape[1])), Bridge())
        if isinstance(result, str):
            return result
        if result:
            site = result[0]
            uses = tuple((use.node, use.index) for use in site.uses)
            # Whoever asks for an embedding by its name means the table itself.
            everyone = uses if uses else tuple(site.value.uses())
            return Place(site.value, everyone, site.transposed)
    graph = finder.source.model.graph
    value = graph.initializers.get(name)
    if value is None or value.const_value is None:
        linear = finder.linear_at(same_path(module)) if kind == "bias" else None
        bias = bias_of(linear) if linear is not None else None
        found = bias[0].inputs[bias[1]] if bias else None
        if bias is None or found is None or constant_of(found) is None:
            return "no such tensor in the graph"
        return _fitting(Place(found, (bias,)), shape)
    mine = tuple((node, index) for node, index in value.uses() if belongs(node, module))
    return _fitting(Place(value, mine or tuple(value.uses())), shape)


def _fitting(place: Place, shape: tuple[int, ...]) -> Place | str:
    tensor = constant_of(place.value)
    found = tuple(int(size) for size in tensor.shape.numpy()) if tensor else ()
    if found != shape:
        return f"shape {list(shape)} expected, the graph's {place.value.name} has {list(found)}"
    if tensor is None or tensor.dtype.name not in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"):
        return f"the graph's {place.value.name} is quantised"
    return place
