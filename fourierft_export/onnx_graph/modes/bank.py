"""Mode bank: a table of adapters as inputs, and per row of the batch the number of its adapter.

The table is the groups' inputs with the number of adapters in front: spectrum [A, L, n], entries
[A, n, 2], scaling [A, L], saved tensors [A, ...]. `adapter_id` [batch] counts its rows from 1; 0 is
the base, which is not in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UsageError
from ...types import Array
from ..adapter_interface import ADAPTER_ID, BASE_PREFIX, PREFIX, Saved
from ..feeds import table
from ..graph.ops import FLOAT32, Ops, replace_uses
from ..locate.saved import Place
from .adapter_inputs import adapter_inputs, group_inputs, take_out
from .batch_dimension import batch_of, is_batch_first, leads_with_batch
from .find_layer_ends import ends_of
from .mode_records import Plan, Written
from .side_branch import SideBranches
from .swappable import written_beside

if TYPE_CHECKING:
    import onnx_ir as ir

ADAPTERS = f"{PREFIX}adapters"


def write(plan: Plan) -> Written:
    """Give a graph a table of adapters, and every row of its batch the one that `adapter_id` names.

    The first dimension of the graph's first input is the batch, and that of every layer's input.

    Raises:
        UsageError: a layer or saved tensor works on something whose first dimension is not the
            batch, or an operator cannot have one saved tensor per row.
        BaseMismatchError: an adapter lacks saved tensors that the base lacks, too.
    """
    model = plan.source.model
    batch = batch_of(model)
    ends = ends_of(plan)
    inputs = adapter_inputs(plan)
    feeds = table(inputs.interface.groups, inputs.defaults)
    written = written_beside(plan, inputs)
    shapes = [(layer, end.x) for layer, several in ends.items() for end in several]
    wrong = [
        f"{layer}: input {'unknown' if x.shape is None else [str(size) for size in x.shape]}"
        for layer, x in shapes
        if (x.shape is not None and len(x.shape) < 2) or not leads_with_batch(x, batch)
    ]
    _refuse(
        wrong,
        expected=f"the batch ({batch}) first, and features last, in the input of every layer",
        found=f"{len(wrong)} layers whose input has another first dimension, or an unknown one",
        remedy="export in mode swappable, or make the batch a dynamic size",
    )
    wrong = [
        f"{name}: used by {node.op_type}"
        for name, places in inputs.places.items()
        for place in places
        for node, index in place.value.uses()
        if _kind(node, index) is None or not _has_rows(node, batch)
    ]
    _refuse(
        wrong,
        expected="saved tensors of linear layers and layer norms that work on the batch",
        found=f"{len(wrong)} uses of another kind",
        remedy="export in mode swappable",
    )
    ops = Ops(model.graph)
    ids = ops.overridable(np.zeros(1, np.int64), ADAPTER_ID, [batch])
    ops.graph.initializers.pop(ADAPTER_ID)
    ids.const_value = None
    rows = _Rows(ops, ids)
    for tensor in inputs.interface.saved:
        places, base = inputs.places[tensor.name], inputs.base[tensor.name]
        for place in places:  # its name is the table's now
            place.value.name = ops.free(f"{PREFIX}unused.{place.value.name}")
        shape: list[int | str] = [ADAPTERS, *tensor.shape]
        adapters = ops.overridable(feeds[tensor.name], tensor.name, shape)
        written.changed[tensor.name] = [adapters]
        rows.write_saved(tensor, places, adapters, base)
    branches = SideBranches(ops)
    for group in inputs.interface.groups:
        spectrum, entries, scaling = (
            rows.pick(value) for value in group_inputs(ops, group, feeds, [ADAPTERS])
        )
        scaling = ops.op("Mul", [scaling, rows.adapted], f"{group.scaling}.or_none")
        tensors = spectrum, entries, scaling
        written.changed |= branches.add_group(group, tensors, ends, batch=rows.batch)
    ops.finish()
    return written


def _refuse(offenders: list[str], *, expected: str, found: str, remedy: str) -> None:
    """Raise an error if there are offenders."""
    if offenders:
        raise UsageError("bank", expected=expected, found=found, remedy=remedy, offenders=offenders)


class _Rows:
    """What each row of the batch takes from the table."""

    def __init__(self, ops: Ops, ids: ir.Value) -> None:
        self.ops = ops
        one = ops.constant(np.array(1), f"{PREFIX}one")
        zero = ops.constant(np.array(0), f"{PREFIX}zero")
        self.ids = ids
        self.batch = ops.op("Shape", [ids], f"{PREFIX}batch")
        before = ops.op("Sub", [ids, one], f"{PREFIX}row")
        self.index = ops.op("Max", [before, zero], f"{PREFIX}table_row")
        adapted = ops.op("Greater", [ids, zero], f"{PREFIX}adapted")
        factor = ops.op("Cast", [adapted], f"{PREFIX}factor", to=FLOAT32)
        axis = ops.constant(np.array([1]), f"{PREFIX}layer_axis")
        self.adapted = ops.op("Unsqueeze", [factor, axis], f"{PREFIX}factors")

    def pick(self, table: ir.Value) -> ir.Value:
        """[A, ...] -> [B, ...]; some row for id 0."""
        return self.ops.op("Gather", [table, self.index], f"{table.name}.picked", axis=0)

    def write_saved(
        self, tensor: Saved, places: Sequence[Place], adapters: ir.Value, base: Array
    ) -> None:
        """Give each row its own version of a saved tensor, for id 0 the base's."""
        ops, name = self.ops, tensor.name
        own = ops.initializer(base[None], BASE_PREFIX + name)  # sessions find it by its name
        both = ops.op("Concat", [own, adapters], f"{name}.with_base", axis=0)
        picked = ops.op("Gather", [both, self.ids], f"{name}.picked", axis=0)
        for place in places:
            for node, index in tuple(place.value.uses()):
                if _kind(node, index) == "weight":
                    self._multiply(node, picked, transposed=place.transposed)
                elif _kind(node, index) == "scale":
                    self._scale(node, picked, base)
                else:
                    self._add(node, index, picked, base)
            if str(place.value.name) in ops.graph.initializers:
                take_out(ops, place.value)

    def _multiply(self, node: ir.Node, picked: ir.Value, *, transposed: bool) -> None:
        """Multiply each row [tokens, in] with its own matrix in place of a MatMul or Gemm."""
        ops, name, y, x = self.ops, str(picked.name), node.outputs[0], node.inputs[0]
        if x is None:
            raise ValueError(f"nothing is fed to {node.name}")
        users, flag = tuple(y.uses()), node.attributes.get("transB")
        by_columns = node.op_type == "MatMul" or flag is None or not flag.as_int()
        weight = picked
        if by_columns == transposed:
            weight = ops.op("Transpose", [picked], f"{name}.turned", perm=[0, 2, 1])
        tokens = ops.constant(np.array([-1]), f"{PREFIX}tokens")
        leading = ops.op("Shape", [x], f"{name}.leading", end=-1)
        last = ops.op("Shape", [x], f"{name}.last", start=-1)
        three = ops.op("Concat", [self.batch, tokens, last], f"{name}.sizes", axis=0)
        inputs = ops.op("Reshape", [x, three], f"{name}.rows")
        product = ops.op("MatMul", [inputs, weight], f"{name}.product")
        width = ops.op("Shape", [weight], f"{name}.width", start=-1)
        shape = ops.op("Concat", [leading, width], f"{name}.shape", axis=0)
        result = ops.op("Reshape", [product, shape], f"{name}.output")
        fixed = node.inputs[2] if len(node.inputs) > 2 else None
        if fixed is not None:
            result.type, result.shape = y.type, y.shape
            result = ops.op("Add", [result, fixed], f"{name}.with_bias")
        replace_uses(users, y, result)
        ops.graph.remove(node)

    def _add(self, node: ir.Node, index: int, picked: ir.Value, base: Array) -> None:
        """Add each row's own bias after a node, or in an Add."""
        ops, y = self.ops, node.outputs[0]
        bias = self._broadcast(picked, y)
        if node.op_type == "Add":
            node.replace_input_with(index, bias)
            return
        users, none = tuple(y.uses()), None
        if node.op_type == "LayerNormalization":
            # A norm gets zeros: ONNX Runtime 1.31 crashes on one whose bias is named "".
            none = ops.constant(np.zeros_like(base), f"{PREFIX}zeros{len(base)}")
        node.replace_input_with(index, none)
        replace_uses(users, y, ops.op("Add", [y, bias], f"{picked.name}.added"))

    def _scale(self, node: ir.Node, picked: ir.Value, base: Array) -> None:
        """Let a LayerNormalization have the rows' own scales; its bias is added afterwards."""
        ops, y, size = self.ops, node.outputs[0], len(base)
        users = tuple(y.uses())
        fixed = node.inputs[2] if len(node.inputs) > 2 else None
        node.replace_input_with(1, ops.constant(np.ones_like(base), f"{PREFIX}ones{size}"))
        scaled = ops.op("Mul", [y, self._broadcast(picked, y)], f"{picked.name}.scaled")
        if fixed is not None:
            zeros = ops.constant(np.zeros_like(base), f"{PREFIX}zeros{size}")
            node.replace_input_with(2, zeros)
            scaled = ops.op("Add", [scaled, fixed], f"{picked.name}.with_bias")
        replace_uses(users, y, scaled)

    def _broadcast(self, picked: ir.Value, y: ir.Value) -> ir.Value:
        """[B, C] as it goes with y [B, ..., C]."""
        rank = len(y.shape or ())
        own = self.ops.constant(np.array([0, *[1] * (rank - 2), -1]), f"{PREFIX}bias{rank}")
        return self.ops.op("Reshape", [picked, own], f"{picked.name}.broadcast")


def _has_rows(node: ir.Node, batch: int | str) -> bool:
    """Whether a node's output has the batch first; graph outputs may call it by another name."""
    rank = len(node.outputs[0].shape or ())
    return rank > 1 and any(
        is_batch_first(value, batch) and len(value.shape or ()) == rank
        for value in (node.outputs[0], *node.inputs)
        if value is not None
    )


def _kind(node: ir.Node, index: int) -> str | None:
    """How a node uses a saved tensor: as weight, bias or scale, or in a way that has no rows."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if node.domain != "" or any(
        node.attributes[name].value != value
        for name, value in plain.items()
        if name in node.attributes
    ):
        return None
    if node.op_type in ("MatMul", "Gemm") and index == 1:
        return "weight"
    if node.op_type == "LayerNormalization" and index == 1:
        return "scale"
    last = node.op_type in ("Gemm", "LayerNormalization") and index == 2
    return "bias" if node.op_type == "Add" or last else None
