"""Finds the products that use a constant as their weight, and the modules that these nodes name.

Apart from the weight's name, exporters leave three traces of a module: the scopes in a node's
metadata (torch's dynamo exporter), the node's name (`/encoder/layer.0/dense/MatMul`: TorchScript,
onnxruntime-genai), and the name of the bias that is added next. Any may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..graph.source import STANDARD, constant_of, constant_shape
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
_MAX_STEPS = 8  # from the constant to the product

# Where the constant's axes 0 and 1 are by now; None is an axis of size 1 that was added.
Axes = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a constant becomes the weight of a linear layer.

    Attributes:
        node, index: the consumer of the constant itself, and which of its inputs it is.
        linear: the product at the end, perhaps behind a Transpose, Reshape, Mul or function call.
        transposed: the constant is taken as (in, out).
        scope: module path in the metadata or the node's name, or None.
        bias: module path in the name of the bias that is added, or None.
        factor: the number that the constant is multiplied with; None if it is not one number.
        plain: the product is x W^T over the last axes of x, its first input, and of its output.
    """

    node: ir.Node
    index: int
    linear: ir.Node
    transposed: bool
    scope: str | None
    bias: str | None
    factor: float | None = 1.0
    plain: bool = False

    @property
    def path(self) -> str | None:
        """The module path, by the stronger evidence."""
        return self.scope or self.bias


@dataclass(frozen=True)
class _Product:
    transposed: bool
    factor: float = 1.0
    plain: bool = False


def use_of(
    node: ir.Node,
    index: int,
    linear: ir.Node,
    transposed: bool,
    factor: float | None = 1.0,
    plain: bool = False,
) -> Use:
    """Make the record of a use, with the modules that the nodes name."""
    scope = scope_of(linear) or scope_of(node)
    return Use(node, index, linear, transposed, scope, _bias_module(linear), factor, plain)


def find_linear_uses(model: ir.Model, value: ir.Value) -> list[Use]:
    """The uses of a matrix as the weight of a linear layer."""
    shape = constant_shape(value)
    return [
        use_of(node, index, *end)
        for node, index in value.uses()
        for end in _follow(model, shape, node, index, (0, 1), 1.0, 0)
    ]


def _follow(
    model: ir.Model,
    shape: Sequence[int],
    node: ir.Node,
    index: int,
    axes: Axes,
    factor: float | None,
    steps: int,
) -> Iterator[tuple[ir.Node, bool, float | None, bool]]:
    """Yield the fields of a `Use` from `linear` on, per path from this input to a product."""
    product = _product(node, index, axes)
    if product is not None:
        factor = None if factor is None else factor * product.factor
        yield node, product.transposed, factor, product.plain
        return
    users: Sequence[tuple[ir.Node, int]] = ()
    function = model.functions.get(node.op_identifier())
    after = _axes_after(node, index, axes, shape)
    if after is not None:
        times = _factor_of(node, index)
        factor = None if factor is None or times is None else factor * times
        axes, users = after, tuple(node.outputs[0].uses())
    elif function is not None and index < len(function.inputs):
        users = tuple(function.inputs[index].uses())
    for user, at in users if steps < _MAX_STEPS else ():
        yield from _follow(model, shape, user, at, axes, factor, steps + 1)


def _product(node: ir.Node, index: int, axes: Axes) -> _Product | None:
    """How a node multiplies with the matrix at this input; None if it does not."""
    kind, upright = node.op_type, axes[-2:] == (0, 1)
    if kind == "Einsum":
        return _einsum(node, index, axes)
    if axes[-2:] not in ((0, 1), (1, 0)) or index > 1:
        return None
    if kind == "MatMul" and node.domain in STANDARD:
        return _Product(upright == bool(index), plain=index == 1)
    alpha, flip = (
        float(_attribute(node, "alpha", 1.0)),
        _flag(node, "transB" if index else "transA"),
    )
    if len(axes) == 2 and (kind in ("Gemm", "FusedGemm") or (kind == "FusedMatMul" and index)):
        plain = kind == "Gemm" and index == 1 and not _flag(node, "transA")
        return _Product((upright != flip) == bool(index), alpha, plain)
    if kind == "Attention" and node.domain == "com.microsoft" and index == 1:
        return _Product(upright)
    return None


def _einsum(node: ir.Node, index: int, axes: Axes) -> _Product | None:
    """An Einsum of x and a matrix that sums over one axis of both, and keeps all others."""
    equation = str(_attribute(node, "equation", "")).replace(" ", "").replace("...", ".")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or len(axes) != 2 or len(terms[index]) != 2:
        return None
    x, weight = terms[1 - index], terms[index]
    summed = [one for one in weight if one in x and one not in out]
    made = [one for one in weight if one in out and one not in x]
    if len(summed) != 1 or len(made) != 1 or any(len({*t}) < len(t) for t in (x, out)):
        return None
    if {*x} - {*summed} != {*out} - {*made}:
        return None
    plain = index == 1 and x[-1:] == summed[0] and out == x[:-1] + made[0]
    return _Product((weight == summed[0] + made[0]) == (axes == (0, 1)), plain=plain)


def _axes_after(node: ir.Node, index: int, axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes of a node's output, where it only moves, adds or scales; None where it does not."""
    kind = node.op_type
    if node.domain not in STANDARD:
        return None
    if kind in ("Mul", "Div"):
        other = constant_of(node.inputs[1 - index])
        if other is None or (kind == "Div" and index):
            return None
        sizes = [int(size) for size in other.shape.numpy()]
        pairs = zip(sizes[::-1], axes[::-1], strict=False)
        wider = len(sizes) > len(axes) or any(s != 1 and axis is None for s, axis in pairs)
        return None if wider else axes
    if index or kind in ("Cast", "Identity"):
        return None if index else axes
    if kind == "Transpose":
        order = _attribute(node, "perm", None) or range(len(axes))[::-1]
        return tuple(axes[int(one)] for one in order)
    numbers = _numbers(node)
    if numbers is None:
        return None
    if kind == "Unsqueeze":
        new = {number % (len(axes) + len(numbers)) for number in numbers}
        old = iter(axes)
        return tuple(None if i in new else next(old) for i in range(len(axes) + len(new)))
    if kind == "Squeeze":
        gone = {number % len(axes) for number in numbers}
        kept = tuple(axis for i, axis in enumerate(axes) if i not in gone)
        return kept if {*kept} >= {0, 1} else None
    return _reshaped(axes, shape, numbers) if kind == "Reshape" else None


def _reshaped(axes: Axes, shape: Sequence[int], target: Sequence[int]) -> Axes | None:
    """The axes after a Reshape that only adds or removes axes of size 1."""
    sizes = [1 if axis is None else shape[axis] for axis in axes]
    wanted = [sizes[i] if size == 0 and i < len(sizes) else size for i, size in enumerate(target)]
    rest = math.prod(size for size in wanted if size != -1)
    wanted = [math.prod(sizes) // rest if size == -1 and rest else size for size in wanted]
    left = [axis for axis in axes if axis is not None]
    result: list[int | None] = []
    for size in wanted:
        fits = bool(left) and size == shape[left[0]]
        if not fits and size != 1:
            return None
        result.append(left.pop(0) if fits else None)
    return None if left else tuple(result)


def _factor_of(node: ir.Node, index: int) -> float | None:
    """The number that a node multiplies its input with; None if it is not one number."""
    if node.op_type not in ("Mul", "Div"):
        return 1.0
    tensor = constant_of(node.inputs[1 - index])
    if tensor is None or tensor.size != 1:
        return None
    number = float(tensor.numpy().reshape(()))
    return number if node.op_type == "Mul" else 1 / number if number else None


def _numbers(node: ir.Node) -> list[int] | None:
    """The constant sizes or axes that a node takes as its second input, or had as attribute."""
    if "axes" in node.attributes:
        return [int(one) for one in node.attributes["axes"].as_ints()]
    tensor = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if tensor is None else [int(one) for one in tensor.numpy().reshape(-1)]


def _attribute(node: ir.Node, name: str, default: object) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _flag(node: ir.Node, name: str) -> bool:
    return bool(_attribute(node, name, 0))


def describe_users(value: ir.Value) -> str:
    """The nodes that use a value, for a message: their operators and names."""
    users = {f"{node.op_type} {node.name or ''}".strip() for node, _ in value.uses()}
    return ", ".join(sorted(users)) or "nothing"


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
