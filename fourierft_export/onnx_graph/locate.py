"""Where the weight of a torch linear layer is in an exported graph.

The exporter keeps a weight's name only where the weight is used as it is stored; before a MatMul
it is transposed and gets a number for a name. What every node keeps is the path of the module it
came from. So: nodes of that module, and among their constants the one that holds the layer's own
numbers; never a guess by shape alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInputError

if TYPE_CHECKING:
    import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class WeightSite:
    """A layer's weight in a graph.

    Attributes:
        layer: module path of the layer.
        value: the initializer.
        transposed: the initializer is (in, out); delta_W is (out, in).
        uses: (node, input index) of every use by this layer.
    """

    layer: str
    value: ir.Value
    transposed: bool
    uses: tuple[tuple[ir.Node, int], ...]


def locate_weights(model: ir.Model, weights: Mapping[str, tuple[Array, bool]]) -> list[WeightSite]:
    """The sites of these layers' weights.

    Args:
        model: a graph exported by torch.onnx with dynamo=True.
        weights: module path -> (weight as stored, whether that is (in, out)).

    Returns:
        One site per layer, in the order given; layers whose weight the graph holds twice, in both
        layouts, get one per initializer.

    Raises:
        BadInputError: listing the layers whose weight is not in the graph.
    """
    users = _constant_users(model)
    sites: list[WeightSite] = []
    missing: list[str] = []
    for layer, (weight, fan_in_fan_out) in weights.items():
        found = _sites(layer, weight, fan_in_fan_out, users.get(layer, []))
        if not found:
            # nn.MultiheadAttention reads its output projection's weight and never calls it.
            found = _sites(layer, weight, fan_in_fan_out, users.get(_parent(layer), []))
        sites += found
        if not found:
            missing.append(layer)
    if missing:
        raise BadInputError(
            "exported graph",
            expected="the weight of every adapted layer, used as a constant",
            found=f"{len(missing)} of {len(weights)} layers without",
            remedy="check that forward() calls these layers with the example inputs",
            offenders=missing,
        )
    return sites


def _sites(
    layer: str, weight: Array, fan_in_fan_out: bool, users: list[tuple[ir.Node, int]]
) -> list[WeightSite]:
    uses: dict[tuple[ir.Value, bool], list[tuple[ir.Node, int]]] = {}
    for node, index in users:
        value = node.inputs[index]
        if value is None or value.const_value is None:
            continue
        flipped = _in_out(value.const_value.numpy(), weight, fan_in_fan_out, node, index)
        if flipped is not None:
            uses.setdefault((value, flipped), []).append((node, index))
    return [WeightSite(layer, v, flipped, tuple(at)) for (v, flipped), at in uses.items()]


def _in_out(
    constant: Array, weight: Array, fan_in_fan_out: bool, node: ir.Node, index: int
) -> bool | None:
    """Whether `constant` is the weight as (in, out); None if it is not the weight at all.

    A weight may equal its own transpose; then the node's way of using it decides.
    """
    if constant.dtype != weight.dtype:
        return None
    as_stored, turned = _same(constant, weight), _same(constant, weight.T)
    if as_stored and turned:
        return _reads_in_out(node, index)
    return fan_in_fan_out if as_stored else not fan_in_fan_out if turned else None


def _same(a: Array, b: Array) -> bool:
    if a.shape != b.shape:
        return False
    bits = np.dtype(f"u{a.itemsize}")
    return bool(np.array_equal(a.view(bits), b.view(bits)))


def _reads_in_out(node: ir.Node, index: int) -> bool | None:
    """Whether `node` takes the constant at `index` as (in, out); None for unknown operators."""
    if node.op_type == "MatMul":
        return index == 1
    if node.op_type == "Gemm":
        attribute = node.attributes.get("transB")
        return index == 1 and not (attribute is not None and attribute.as_int())
    return False if node.op_type == "Transpose" else None


def _constant_users(model: ir.Model) -> dict[str, list[tuple[ir.Node, int]]]:
    """Module path -> the uses of constant matrices by nodes made in that module itself."""
    users: dict[str, list[tuple[ir.Node, int]]] = {}
    for node in _nodes(model):
        module = _module(node)
        for index, value in enumerate(node.inputs):
            if module is not None and value is not None and _is_constant_matrix(value):
                users.setdefault(module, []).append((node, index))
    return users


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    import onnx_ir as ir

    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def _is_constant_matrix(value: ir.Value) -> bool:
    constant = value.const_value
    return constant is not None and value.is_initializer() and len(constant.shape) == 2


def _module(node: ir.Node) -> str | None:
    """Path of the module a node was made in. A second call of a module is named `path@1`."""
    text = node.metadata_props.get(SCOPES)
    if not text:
        return None
    *modules, _ = ast.literal_eval(text)
    return str(modules[-1]).partition("@")[0] if modules else None


def _parent(layer: str) -> str:
    return layer.rpartition(".")[0]
