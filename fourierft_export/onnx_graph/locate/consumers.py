"""Who uses a weight in a graph: in which orientation, and on behalf of which module.

Exporters leave three traces of a module beside its weight's name: the scopes in a node's metadata
(torch's dynamo exporter), the node's own name (TorchScript: `/encoder/layer.0/dense/MatMul`; the
same in onnxruntime-genai), and the name of the bias that is added next. Any may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

from ..graph.ops import STANDARD

SCOPES = "pkg.torch.onnx.name_scopes"
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_WEIGHT = re.compile(
    r"(?:\.MatMul(?:NBits)?(?:\.DequantizeLinear)?)?\.q?(?:weight|kernel)"
    r"(?:_quantized|(?:_DQ)?_Q\d\w*)?$"
)
_BIAS = re.compile(r"(?:\.Add)?\.bias(?:_quantized)?$")
_MAX_TEXT = 4096


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a constant becomes the weight of a linear layer.

    Attributes:
        node, index: the consumer of the constant itself, and which of its inputs it is.
        linear: the MatMul or Gemm at the end, perhaps behind a Transpose, Cast or function call.
        transposed: the constant is taken as (in, out).
        scope: module path by metadata or node name, if they tell.
        bias: module path by the bias that is added, if that has a name.
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


def linear_uses(model: ir.Model, value: ir.Value) -> list[Use]:
    """The uses of a constant as a matrix of weights; other uses are left out."""
    return [
        Use(node, index, linear, transposed, _scope(linear) or _scope(node), _bias(linear))
        for node, index in value.uses()
        for linear, transposed in _follow(model, node, index, False, 0)
    ]


def _follow(
    model: ir.Model, node: ir.Node, index: int, turned: bool, depth: int
) -> Iterator[tuple[ir.Node, bool]]:
    """(linear node, the constant is taken as (in, out)) per way from here to a MatMul or Gemm."""
    layout = _layout(node, index)
    if layout is not None:
        yield node, layout != turned
        return
    if depth > 8:
        return
    if _passes_on(node, index):
        # perm [1, 0]: the only one of a matrix that is not the identity
        flips = node.op_type == "Transpose" and _ints(node, "perm") in ([1, 0], [])
        for output in node.outputs[:1]:
            for user, at in output.uses():
                yield from _follow(model, user, at, turned != flips, depth + 1)
        return
    function = model.functions.get(node.op_identifier())
    if function is not None and index < len(function.inputs):
        for user, at in function.inputs[index].uses():
            yield from _follow(model, user, at, turned, depth + 1)


def source_of(value: ir.Value | None) -> ir.Value | None:
    """Where a value comes from, through what only turns or casts it."""
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
    if "alpha" in node.attributes and node.attributes["alpha"].as_float() != 1.0:
        return None  # the layer's weight is a multiple of this constant
    if node.op_type in ("Gemm", "FusedGemm") and index in (0, 1):
        turned = bool(_int(node, "transB" if index else "transA"))
        return turned != bool(index)
    if node.op_type == "FusedMatMul" and index == 1:
        return not _int(node, "transB")
    if node.op_type == "Attention" and node.domain == "com.microsoft" and index == 1:
        return True
    return None


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else 0


def _ints(node: ir.Node, name: str) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else []


def _scope(node: ir.Node) -> str | None:
    """The module path that a node's metadata or name tells."""
    text = node.metadata_props.get(SCOPES, "")
    scopes = [a or b for a, b in _QUOTED.findall(text[:_MAX_TEXT])]
    if len(scopes) > 1 and scopes[-2]:
        return str(scopes[-2])
    return scope_of_name(node.name or "")


def scope_of_name(name: str) -> str | None:
    """The module path in a node name such as `/encoder/layer.0/dense/MatMul`; None if none is.

    A container's child is named with its container: `/ff/ff.0/MatMul` is module `ff.0`.
    """
    segments = name[:_MAX_TEXT].split("/")
    if len(segments) < 3 or segments[0]:
        return None
    path: list[str] = []
    for segment in segments[1:-1]:
        if path and segment.startswith(f"{path[-1]}."):
            path[-1] = segment
        else:
            path.append(segment)
    return ".".join(path) or None


def scope_of_weight(name: str) -> str | None:
    """The module path in the name of a weight; None for a name that ends otherwise."""
    path, count = _WEIGHT.subn("", name)
    return path if count and path else None


def scope_of_bias(name: str) -> str | None:
    """The module path in the name of a bias; None for a name that ends otherwise."""
    path, count = _BIAS.subn("", name)
    return path if count and path else None


def bias_of(linear: ir.Node) -> tuple[ir.Node, int] | None:
    """Where a linear node's bias comes in: (node, input index) of a constant; None without one."""
    from ..graph.source import constant_of

    if linear.op_type in ("Gemm", "FusedGemm"):
        third = linear.inputs[2] if len(linear.inputs) > 2 else None
        return (linear, 2) if third is not None else None
    output = linear.outputs[0]
    for _ in range(4):  # through the Cast and Mul that follow a MatMulInteger
        users = list(output.uses())
        if len(users) != 1:
            return None
        node, index = users[0]
        if node.op_type == "Add" and len(node.inputs) == 2:
            other = node.inputs[1 - index]
            is_constant = other is not None and constant_of(other) is not None
            return (node, 1 - index) if is_constant else None
        if node.op_type not in ("Cast", "Mul"):
            return None
        output = node.outputs[0]
    return None


_BETWEEN = ("Cast", "Mul", "QuantizeLinear", "DequantizeLinear")


def _bias(linear: ir.Node) -> str | None:
    """The module path in the name of the bias that is added, also a quantised one."""
    if linear.op_type in ("Gemm", "FusedGemm"):
        return _bias_name(linear.inputs[2]) if len(linear.inputs) > 2 else None
    output = linear.outputs[0]
    for _ in range(6):
        users = list(output.uses())
        if len(users) != 1:
            return None
        node, index = users[0]
        if node.op_type == "Add" and len(node.inputs) == 2:
            return _bias_name(node.inputs[1 - index])
        if node.op_type not in _BETWEEN:
            return None
        output = node.outputs[0]
    return None


def _bias_name(value: ir.Value | None) -> str | None:
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    return scope_of_bias(str(value.name)) if value is not None else None


def paths_of(linear: ir.Node, weight: str) -> list[str]:
    """The module paths that a linear node's traces tell, strongest first."""
    told = (scope_of_weight(weight), _scope(linear), _bias(linear))
    return [path for path in told if path]


def same_path(path: str) -> str:
    """A module path without what onnxruntime-genai writes differently."""
    return path.replace(".self_attn.", ".attn.")


def same_module(one: str, other: str) -> bool:
    """Whether two paths may be one module's, a prefix aside."""
    a, b = f".{same_path(one)}", f".{same_path(other)}"
    return a.endswith(b) or b.endswith(a)


def belongs(node: ir.Node, module: str) -> bool:
    """Whether a node may be the module's: nothing says that it is another's."""
    scope = _scope(node)
    return scope is None or same_module(scope, module)
