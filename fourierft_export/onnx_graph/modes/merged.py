"""Mode merged: W + delta_W in place of each W, rounded once; the nodes stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.file import Bundle
from ...errors import BadInputError, UsageError
from ...types import Array
from ..adapters import adapted_weight, layer_terms
from ..graph.source import Source, constant_of
from ..locate.saved import Place
from ..locate.site import Site
from ..metadata import Written

if TYPE_CHECKING:
    import onnx_ir as ir


def write(
    source: Source,
    adapters: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    saved: Mapping[str, Sequence[Place]],
) -> Written:
    """Add every adapter's change to the weights, and put its saved tensors in place.

    Args:
        source: the graph, which is changed in place.
        adapters: adapter name -> bundle, bound to the graph; they add up.
        sites: layer -> its float weights.
        saved: saved tensor -> its places.

    Raises:
        UsageError: two adapters have different values for one saved tensor.
        BadInputError: a value that the graph's dtype cannot hold.
    """
    put_saved(source, adapters, saved)
    written = Written()
    groups: dict[ir.Value, list[Site]] = {}
    copies: dict[tuple[ir.Value, tuple[tuple[ir.Node, int], ...]], ir.Value] = {}
    for several in sites.values():
        for site in several:
            value = site.value
            if (
                site.shared
            ):  # other nodes keep the base's weight; parts of a packed one share a copy
                key = value, site.consumers
                if key not in copies:
                    copies[key] = source.isolate_constant(value, site.consumers)
                value = copies[key]
            groups.setdefault(value, []).append(site)
            written.add(site.layer, str(value.name), site.transposed, value)
    for value, group in groups.items():
        tensor = constant_of(value)
        if tensor is None:
            raise ValueError(f"{value.name} is no constant")
        make = partial(_merged, source, adapters, tensor, group, str(value.name))
        source.replace_constant(value, make)
    return written


def _merged(
    source: Source,
    adapters: Mapping[str, Bundle],
    tensor: ir.TensorProtocol,
    group: Sequence[Site],
    name: str,
) -> Array:
    """A constant with the changes of all layers in it."""
    parts = {site.layer: site.rows for site in group}
    terms = {layer: [*layer_terms(adapters, layer).values()] for layer in parts}
    with np.errstate(over="ignore"):  # judged by its result
        total = adapted_weight(source.read(tensor), parts, terms, transposed=group[0].transposed)
    if not np.isfinite(total).all():
        raise BadInputError(
            f"weight {name}",
            expected=f"W + delta_W within {total.dtype.name}",
            found="an overflow, or values that are not finite",
            remedy="check the adapter's scaling, or use a model of a wider dtype",
        )
    return total


def put_saved(
    source: Source, adapters: Mapping[str, Bundle], saved: Mapping[str, Sequence[Place]]
) -> None:
    """Replace the graph's heads and biases by the adapters' own.

    Raises:
        UsageError, BadInputError: as in `write`.
    """
    wanted = saved_values(adapters)
    for key, places in saved.items():
        for place in places:
            value = source.isolate_constant(place.value, place.uses)
            content = _cast(wanted[key].T if place.transposed else wanted[key], value, key)
            source.replace_constant(value, lambda content=content: content)  # type: ignore[misc]


def saved_values(adapters: Mapping[str, Bundle]) -> dict[str, Array]:
    """Saved tensor -> its value in the adapters that have it.

    Raises:
        UsageError: two of them have different values.
    """
    wanted: dict[str, Array] = {}
    for name, bundle in adapters.items():
        for key, array in bundle.saved.items():
            if key in wanted and wanted[key].tobytes() != array.tobytes():
                raise UsageError(
                    key,
                    expected="the same value in every adapter",
                    found=f"another one in adapter {name}",
                    remedy="use adapters with heads of their own one at a time",
                )
            wanted[key] = array
    return wanted


def _cast(array: Array, value: ir.Value, name: str) -> Array:
    tensor = constant_of(value)
    if tensor is None:
        raise ValueError(f"{value.name} is no constant")
    with np.errstate(over="ignore"):
        cast = array.astype(tensor.dtype.numpy())
    if not np.isfinite(cast.astype(np.float32)).all():
        raise BadInputError(name, expected=f"values that {cast.dtype} holds", found="larger ones")
    return cast
