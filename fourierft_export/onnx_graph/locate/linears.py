"""Linear layers and saved tensors as places in a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...errors import BadInputError, UsageError
from ...types import Array
from .marks import WeightSite

if TYPE_CHECKING:
    import onnx_ir as ir


class HasEnds(Protocol):
    """A linear layer in a graph: a node, or whatever stands for several that are one layer."""

    @property
    def inputs(self) -> Sequence[ir.Value | None]:
        """X comes first."""

    @property
    def outputs(self) -> Sequence[ir.Value]:
        """Y comes first."""


def linear_nodes(site: WeightSite) -> list[ir.Node]:
    """The MatMul and Gemm nodes that multiply with a site's weight, also behind a Transpose.

    Raises:
        UsageError: something else uses the weight.
    """
    nodes = list(_follow(site.value))
    wrong = sorted({node.op_type for node in nodes if not _is_linear(node, site.value)})
    if wrong or not nodes:
        raise UsageError(
            f"layer {site.layer}",
            expected="a weight that MatMul or Gemm multiply an input with",
            found=", ".join(wrong) or "a weight that nothing uses",
            remedy="export it in mode merged or unmerged",
        )
    return nodes


def _follow(value: ir.Value) -> Iterator[ir.Node]:
    for node, _ in value.uses():
        if node.op_type == "Transpose" and node.domain == "":
            yield from _follow(node.outputs[0])
        else:
            yield node


def _is_linear(node: ir.Node, weight: ir.Value) -> bool:
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm") or node.inputs[0] is weight:
        return False
    plain = {"alpha": 1.0, "transA": 0}
    return all(
        node.attributes[name].value == value
        for name, value in plain.items()
        if name in node.attributes
    )


@dataclass(frozen=True, eq=False)
class SavedSite:
    """Where a saved tensor is in a graph.

    Attributes:
        name: in the adapted model.
        value: the initializer.
        turned: it holds the transpose.
    """

    name: str
    value: ir.Value
    turned: bool


def locate_saved(model: ir.Model, marks: Mapping[str, Array]) -> list[SavedSite]:
    """The initializers that hold these marks, at least one for each.

    Raises:
        BadInputError: listing the tensors whose mark is not in the graph.
    """
    sites = []
    missing = []
    for name, mark in marks.items():
        found = [
            SavedSite(name, value, turned)
            for value in model.graph.initializers.values()
            if (turned := _turned(value, mark)) is not None
        ]
        sites += found
        if not found:
            missing.append(name)
    if missing:
        raise BadInputError(
            "exported graph",
            expected="every saved tensor of the adapters, as a constant",
            found=f"{len(missing)} of {len(marks)} that are not there",
            remedy="export in mode merged, or leave them out of modules_to_save",
            offenders=missing,
        )
    return sites


def _turned(value: ir.Value, mark: Array) -> bool | None:
    constant = value.const_value
    if constant is None or constant.size != mark.size:
        return None
    shape = tuple(constant.shape.numpy())
    if shape == mark.shape and np.array_equal(constant.numpy(), mark):
        return False
    turned = mark.ndim == 2 and shape == mark.shape[::-1]
    return True if turned and np.array_equal(constant.numpy(), mark.T) else None
