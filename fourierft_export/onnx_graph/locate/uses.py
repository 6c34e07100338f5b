"""Finds the nodes that use a weight, the orientation they take it in, and their modules.

Apart from the weight's name, exporters leave three traces of a module: the scopes in a node's
metadata (torch's dynamo exporter), the node's name (`/encoder/layer.0/dense/MatMul`: TorchScript,
onnxruntime-genai), and the name of the bias that is added next. Any may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..graph.source import STANDARD
from .module_names import (
    module_of_bias,
    module_of_node,
    module_of_scopes,
    module_of_weight,
    same_module,
)

if TYPE_CHECKING:
    import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
_BEFORE_BIAS = ("Cast", "Mul", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a constant becomes the weight of a linear layer.

    Attributes:
        node, index: the consumer of the constant itself, and which of its inputs it is.
        linear: the MatMul or Gemm at the end, perhaps behind a Transpose, Cast or function call.
        transposed: the constant is taken as (in, out).
        scope: module path in the metadata or the node's name, or None.
        bias: module path in the name of the bias that is added, or None.
    """

    node: ir.Node
    index: int
    linear: ir.Node
    transposed: bool
    scope: str | None
    bias: str | None

    @property
    def path(self) -> str | None:
        """The module path, by the stronger evidence."""
        return self.scope or self.bias


def use_of(node: ir.Node, index: int, linear: ir.Node, transposed: bool) -> Use:
    """Make the record of a use, with the modules that the nodes name."""
    return Use(
        node, index, linear, transposed, scope_of(linear) or scope_of(node), _bias_module(linear)
    )


def find_linear_uses(model: ir.Model, value: ir.Value) -> list[Use]:
    """The uses of a constant as the weight of a linear layer."""
    return [
        use_of(node, index, linear, transposed)
        for node, index in value.uses()
        for linear, transposed in _follow(model, node, index, False, 0)
    ]


def _follow(
    model: ir.Model, node: ir.Node, index: int, flipped: bool, depth: int
) -> Iterator[tuple[ir.Node, bool]]:
    """Yield (linear node, the constant is taken as (in, out)) per path to a MatMul or Gemm."""
    layout = _layout(node, index)
    if layout is not None:
        yield node, layout != flipped
        return
    if depth > 8:
        return
    if _passes_on(node, index):
        # perm [1, 0]: the only one of a matrix that is not the identity
        flips = node.op_type == "Transpose" and _attribute(node, "perm", [1, 0]) == [1, 0]
        for output in node.outputs[:1]:
            for user, at in output.uses():
                yield from _follow(model, user, at, flipped != flips, depth + 1)
        return
    function = model.functions.get(node.op_identifier())
    if function is not None and index < len(function.inputs):
        for user, at in function.inputs[index].uses():
            yield from _follow(model, user, at, flipped, depth + 1)


def describe_users(value: ir.Value) -> str:
    """The nodes that use a value, for a message: their operators and names."""
    users = {f"{node.op_type} {node.name or ''}".strip() for node, _ in value.uses()}
    return ", ".join(sorted(users)) or "nothing"


def source_of(value: ir.Value | None) -> ir.Value | None:
    """The value that another one is a transposed, cast or identical copy of."""
    node = value.producer() if value is not None else None
    while node is not None and _passes_on(node, 0):
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return value


def _passes_on(node: ir.Node, index: int) -> bool:
    kinds = ("Transpose", "Cast", "Identity")
    return index == 0 and node.domain in STANDARD and node.op_type in kinds


def _layout(node: ir.Node, index: int) -> bool | None:
    """Whether this input of a linear node is taken as (in, out); None if it is no weight."""
    if node.op_type == "MatMul" and node.domain in STANDARD:
        return {0: False, 1: True}.get(index)
    if _attribute(node, "alpha", 1.0) != 1.0:
        return None  # the layer's weight is a multiple of this constant
    if node.op_type in ("Gemm", "FusedGemm") and index in (0, 1):
        flipped = bool(_attribute(node, "transB" if index else "transA", 0))
        return flipped != bool(index)
    if node.op_type == "FusedMatMul" and index == 1:
        return not _attribute(node, "transB", 0)
    if node.op_type == "Attention" and node.domain == "com.microsoft" and index == 1:
        return True
    return None


def _attribute(node: ir.Node, name: str, default: object) -> object:
    if name not in node.attributes:
        return default
    value = node.attributes[name].value
    return list(value) if isinstance(value, (list, tuple)) else value


def scope_of(node: ir.Node) -> str | None:
    """The module path in a node's metadata or name."""
    return module_of_scopes(node.metadata_props.get(SCOPES, "")) or module_of_node(node.name or "")


def modules_of(linear: ir.Node, weight: str) -> list[str]:
    """The module paths in the names of a weight, its node and its bias, best evidence first."""
    paths = (module_of_weight(weight), scope_of(linear), _bias_module(linear))
    return [path for path in paths if path]


def may_belong_to(node: ir.Node, module: str) -> bool:
    """Whether a node names the module, or names none."""
    scope = scope_of(node)
    return scope is None or same_module(scope, module)


def find_bias(linear: ir.Node) -> tuple[ir.Node, int] | None:
    """Where something is added to a linear node's output: (node, index of that input), or None."""
    if linear.op_type in ("Gemm", "FusedGemm"):
        return (linear, 2) if len(linear.inputs) > 2 and linear.inputs[2] is not None else None
    output = linear.outputs[0]
    for _ in range(6):  # through what follows a quantised product
        users = list(output.uses())
        if len(users) != 1:
            return None
        node, index = users[0]
        if node.op_type == "Add" and len(node.inputs) == 2:
            return node, 1 - index
        if node.op_type not in _BEFORE_BIAS:
            return None
        output = node.outputs[0]
    return None


def _bias_module(linear: ir.Node) -> str | None:
    """The module path in the name of the bias that is added, also of a quantised one."""
    place = find_bias(linear)
    value = place[0].inputs[place[1]] if place else None
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    return module_of_bias(str(value.name)) if value is not None else None
