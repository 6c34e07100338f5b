"""An adapter's dense tensors (heads, biases) in place of a graph's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.file import Bundle
from ...errors import BadInputError, UsageError
from ...types import Array
from ..graph.edits import Edits
from ..graph.source import constant_of
from ..locate.saved import Place

if TYPE_CHECKING:
    import onnx_ir as ir


def put_saved(places: Mapping[str, Place], edits: Edits, bundles: Mapping[str, Bundle]) -> None:
    """Replace the graph's heads and biases by the bundles' own.

    Raises:
        UsageError: two bundles set one tensor to different values.
        BadInputError: a value that the graph's dtype cannot hold.
    """
    wanted: dict[str, Array] = {}
    for name, bundle in bundles.items():
        for key, array in bundle.saved.items():
            if key in wanted and wanted[key].tobytes() != array.tobytes():
                raise UsageError(
                    key,
                    expected="one value",
                    found=f"another in adapter {name}",
                    remedy="apply adapters with heads of their own one at a time",
                )
            wanted[key] = array
    for key, place in places.items():
        value = edits.own(place.value, place.uses)
        content = _cast(wanted[key].T if place.transposed else wanted[key], value, key)
        edits.put(value, lambda content=content: content)  # type: ignore[misc]


def _cast(array: Array, value: ir.Value, name: str) -> Array:
    tensor = constant_of(value)
    if tensor is None:
        raise ValueError(f"{value.name} is no constant")
    with np.errstate(over="ignore"):
        cast = array.astype(tensor.dtype.numpy())
    if not np.isfinite(cast.astype(np.float32)).all():
        raise BadInputError(name, expected=f"values that {cast.dtype} holds", found="larger ones")
    return cast
