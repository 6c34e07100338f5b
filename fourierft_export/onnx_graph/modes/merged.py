"""Mode merged: W + delta_W in place of each W, rounded once; the nodes stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.bundle import Bundle
from ...errors import BadInputError, UsageError
from ...types import Array
from ..adapters import adapted_weight, layer_terms
from ..graph.source import constant_of
from ..locate.site import Site
from .mode_records import Plan, Written

if TYPE_CHECKING:
    import onnx_ir as ir


def write(plan: Plan) -> Written:
    """Add every adapter's change to the weights, and put its saved tensors in place.

    Raises:
        UsageError: two adapters have different values for one saved tensor.
        BadInputError: a value that the graph's dtype cannot hold.
    """
    source, written = plan.source, put_saved(plan)
    groups: dict[ir.Value, list[Site]] = {}
    copies: dict[object, ir.Value] = {}
    for site in plan.every_site:
        value = site.value
        if site.shared:  # other nodes keep the base's weight; parts of a packed one share a copy
            key = value, site.consumers
            if key not in copies:
                copies[key] = source.isolate_constant(value, site.consumers)
            value = copies[key]
        groups.setdefault(value, []).append(site)
        written.add_weight(site, str(value.name), value)
    for value, group in groups.items():
        tensor = constant_of(value)
        if tensor is None:
            raise ValueError(f"{value.name} is no constant")
        source.replace_constant(value, partial(_merged, plan, tensor, group, str(value.name)))
    return written


def _merged(plan: Plan, tensor: ir.TensorProtocol, group: Sequence[Site], name: str) -> Array:
    """A constant with the changes of all layers in it."""
    parts = {site.layer: site.rows for site in group}
    terms = {layer: [*layer_terms(plan.adapters, layer).values()] for layer in parts}
    base = plan.source.read(tensor)
    with np.errstate(over="ignore"):  # judged by its result
        total = adapted_weight(base, parts, terms, transposed=group[0].transposed)
    if not np.isfinite(total).all():
        raise BadInputError(
            f"weight {name}",
            expected=f"W + delta_W within {total.dtype.name}",
            found="an overflow, or values that are not finite",
            remedy="check the adapter's scaling, or use a model of a wider dtype",
        )
    return total


def put_saved(plan: Plan) -> Written:
    """Replace the graph's heads and biases by the adapters' own."""
    written, wanted = Written(), saved_values(plan.adapters)
    for key, places in plan.saved.items():
        for place in places:
            value = plan.source.isolate_constant(place.value, place.uses)
            tensor = constant_of(value)
            if tensor is None:
                raise ValueError(f"{value.name} is no constant")
            with np.errstate(over="ignore"):
                own = wanted[key].T if place.transposed else wanted[key]
                content = own.astype(tensor.dtype.numpy())
            if not np.isfinite(content.astype(np.float32)).all():
                raise BadInputError(
                    key, expected=f"values that {content.dtype} holds", found="larger ones"
                )
            plan.source.replace_constant(value, lambda content=content: content)  # type: ignore[misc]
            written.changed.setdefault(key, []).append(value)
    return written


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
