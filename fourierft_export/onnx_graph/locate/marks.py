"""Where the weights of torch's linear layers went in an exported graph.

The exporter keeps a weight's name only where the weight is used as it is stored: before a MatMul it
is transposed and gets a number for a name. It also shares equal constants, and computes equal nodes
once. So the graph is traced with marks, random weights that stand for the real ones: no two are
equal, none is its own transpose, and what holds a mark's numbers afterwards is that layer's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import BadInputError
from ...types import Array

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class WeightSite:
    """A layer's weight in a graph.

    Attributes:
        layer: module path of the layer.
        value: the initializer.
        turned: it holds the transpose of what the layer stores.
    """

    layer: str
    value: ir.Value
    turned: bool


def locate_marks(model: ir.Model, marks: Mapping[str, Array]) -> list[WeightSite]:
    """The initializers that hold these marks.

    Args:
        model: a graph traced with the marks.
        marks: module path -> (rows, columns) random numbers that stood for the layer's weight.

    Returns:
        The sites in the order of `marks`; a layer whose weight the graph holds in both layouts has
        one per initializer.

    Raises:
        BadInputError: listing the layers whose mark is not in the graph.
    """
    # The first element stays in its place under transposition.
    matrices: dict[bytes, list[tuple[ir.Value, Array]]] = {}
    for value in model.graph.initializers.values():
        constant = value.const_value
        if constant is not None and len(constant.shape) == 2:
            array = constant.numpy()
            matrices.setdefault(_first(array), []).append((value, array))
    found = {
        layer: [
            WeightSite(layer, value, turned)
            for value, array in matrices.get(_first(mark), [])
            if (turned := _turned(array, mark)) is not None
        ]
        for layer, mark in marks.items()
    }
    missing = [layer for layer, sites in found.items() if not sites]
    if missing:
        raise BadInputError(
            "exported graph",
            expected="the weight of every adapted layer, as a constant",
            found=f"{len(missing)} of {len(found)} layers without",
            remedy="check that forward() calls these layers with the example inputs",
            offenders=missing,
        )
    return [site for sites in found.values() for site in sites]


def _first(array: Array) -> bytes:
    return array[:1, :1].tobytes()


def _turned(array: Array, mark: Array) -> bool | None:
    """Whether `array` is the transpose of `mark`; None if it is neither that nor `mark`."""
    if array.dtype != mark.dtype:
        return None
    if np.array_equal(array, mark):
        return False
    return True if np.array_equal(array, mark.T) else None
