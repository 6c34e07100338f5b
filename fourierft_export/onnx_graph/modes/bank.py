"""Mode bank: a table of adapters as inputs, and per row of the batch the number of its adapter.

The table is the groups' inputs with the number of adapters in front: spectrum [A, L, n], entries
[A, n, 2], scaling [A, L], saved tensors [A, ...]. `adapter_id` [batch] counts its rows from 1; 0 is
the base, which is not in the table.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.file import Bundle
from ...errors import UsageError
from ...types import Array
from ..feeds import table
from ..graph.ops import FLOAT32, Ops, replace_uses
from ..graph.source import Source
from ..interface import ADAPTER_ID, BASE_PREFIX, PREFIX
from ..locate.saved import Place
from ..locate.site import Site
from ..metadata import Written
from ..mode_names import DEFAULTS
from .batch_rows import batch_of, is_batch_first, leads_with_batch
from .inputs import AdapterInputs, adapter_inputs, group_inputs, take_out
from .layer_inputs_outputs import Ends, ends_of
from .side_branch import SideBranches
from .swappable import written_beside

if TYPE_CHECKING:
    import onnx_ir as ir

ADAPTERS = f"{PREFIX}adapters"


def write(
    source: Source,
    adapters: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    saved: Mapping[str, Sequence[Place]],
    *,
    defaults: str = DEFAULTS[0],
    absent: Container[str] = (),
) -> Written:
    """Give a graph a table of adapters, and every row of its batch the one that `adapter_id` names.

    Args:
        source, sites, saved, defaults, absent: as in `swappable.write`; the first dimension of the
            graph's first input is the batch, and that of every adapted layer's input.
        adapters: the table's rows.

    Raises:
        UsageError: a layer or saved tensor works on something whose first dimension is not the
            batch, or an operator cannot have one saved tensor per row.
        BaseMismatchError: as in `adapter_inputs`.
    """
    model = source.model
    batch = batch_of(model)
    ends = ends_of(source, sites)
    inputs = adapter_inputs(source, adapters, sites, saved, defaults=defaults, absent=absent)
    groups = inputs.interface.groups
    feeds = table(groups, inputs.defaults)
    written = written_beside(inputs, sites)
    _check_batched(ends, batch)
    ops = Ops(model.graph)
    ids = ops.overridable(np.zeros(1, np.int64), ADAPTER_ID, [batch])
    ops.graph.initializers.pop(ADAPTER_ID)
    ids.const_value = None
    rows = _Rows(ops, ids)
    _write_saved(rows, inputs, feeds, batch)
    branches = SideBranches(ops)
    for group in groups:
        spectrum, entries, scaling = (
            rows.pick(value) for value in group_inputs(ops, group, feeds, [ADAPTERS])
        )
        scaling = ops.op("Mul", [scaling, rows.adapted], f"{group.scaling}.or_none")
        tensors = spectrum, entries, scaling
        written.changed |= branches.add_group(group, tensors, ends, batch=rows.batch)
    ops.finish()
    return written


def _check_batched(ends: Mapping[str, Sequence[Ends]], batch: int | str) -> None:
    wrong = []
    for layer, several in ends.items():
        for x in (end.x for end in several):
            if not leads_with_batch(x, batch):
                shape = "unknown" if x.shape is None else str([str(size) for size in x.shape])
                wrong.append(f"{layer}: input {shape}")
    if wrong:
        raise UsageError(
            "bank",
            expected=f"the batch ({batch}) first in the input of every adapted layer",
            found=f"{len(wrong)} layers whose input has another first dimension, or an unknown one",
            remedy="export in mode swappable, or make the batch a dynamic size",
            offenders=wrong,
        )


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

    def pick_or_base(self, table: ir.Value, base: Array) -> ir.Value:
        """[A, ...] -> [B, ...]; the base's own for id 0."""
        own = self.ops.initializer(base[None], BASE_PREFIX + str(table.name))  # found by its name
        both = self.ops.op("Concat", [own, table], f"{table.name}.with_base", axis=0)
        return self.ops.op("Gather", [both, self.ids], f"{table.name}.picked", axis=0)


def _write_saved(
    rows: _Rows, inputs: AdapterInputs, feeds: Mapping[str, Array], batch: int | str
) -> None:
    """One version of each saved tensor per row, where an operator can have that."""
    ops = rows.ops
    wrong = [
        f"{name}: used by {node.op_type}"
        for name, places in inputs.places.items()
        for place in places
        for node, index in place.value.uses()
        if _kind(node, index) is None or not _has_rows(node, batch)
    ]
    if wrong:
        raise UsageError(
            "bank",
            expected="saved tensors of linear layers and layer norms that work on the batch",
            found=f"{len(wrong)} uses of another kind",
            remedy="export in mode swappable",
            offenders=wrong,
        )
    for tensor in inputs.interface.saved:
        base = inputs.base[tensor.name]
        for place in inputs.places[tensor.name]:  # its name is the table's now
            place.value.name = ops.free(f"{PREFIX}unused.{place.value.name}")
        adapters = ops.overridable(feeds[tensor.name], tensor.name, [ADAPTERS, *tensor.shape])
        picked = rows.pick_or_base(adapters, base)
        for place in inputs.places[tensor.name]:
            for node, index in tuple(place.value.uses()):
                if _kind(node, index) == "scale":
                    _scale(ops, node, picked, np.ones_like(base))
                else:
                    _use(ops, rows, node, index, picked, place.transposed, base)
            if str(place.value.name) in ops.graph.initializers:
                take_out(ops, place.value)


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


def _use(
    ops: Ops,
    rows: _Rows,
    node: ir.Node,
    index: int,
    picked: ir.Value,
    transposed: bool,
    base: Array,
) -> None:
    """Let `node` use the rows' own tensors [B, ...] in place of the one at `index`."""
    name = str(picked.name)
    y = node.outputs[0]
    users = tuple(y.uses())
    if _kind(node, index) == "bias":
        bias = _broadcast(ops, picked, y)
        if node.op_type == "Add":
            node.replace_input_with(index, bias)
            return
        # A norm gets zeros: ONNX Runtime 1.31 crashes on one whose bias is named "".
        norm = node.op_type == "LayerNormalization"
        none = ops.constant(np.zeros_like(base), f"{PREFIX}zeros{len(base)}") if norm else None
        node.replace_input_with(index, none)
        replace_uses(users, y, ops.op("Add", [y, bias], f"{name}.added"))
        return
    x, fixed = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    if x is None:
        return
    by_columns = node.op_type == "MatMul" or not _flag(node, "transB")
    weight = picked
    if by_columns == transposed:
        weight = ops.op("Transpose", [picked], f"{name}.turned", perm=[0, 2, 1])
    tokens = ops.constant(np.array([-1]), f"{PREFIX}tokens")
    sizes = [ops.op("Shape", [x], f"{name}.{what}", **at) for what, at in _LEADING.items()]
    three = ops.op("Concat", [rows.batch, tokens, sizes[1]], f"{name}.sizes", axis=0)
    product = ops.op(
        "MatMul", [ops.op("Reshape", [x, three], f"{name}.rows"), weight], f"{name}.product"
    )
    width = ops.op("Shape", [weight], f"{name}.width", start=-1)
    shape = ops.op("Concat", [sizes[0], width], f"{name}.shape", axis=0)
    result = ops.op("Reshape", [product, shape], f"{name}.output")
    if fixed is not None:
        result.type, result.shape = y.type, y.shape
        result = ops.op("Add", [result, fixed], f"{name}.with_bias")
    replace_uses(users, y, result)
    ops.graph.remove(node)


def _scale(ops: Ops, node: ir.Node, picked: ir.Value, ones: Array) -> None:
    """Let a LayerNormalization have the rows' own scales; what it added is added afterwards."""
    y, name = node.outputs[0], str(picked.name)
    users = tuple(y.uses())
    fixed = node.inputs[2] if len(node.inputs) > 2 else None
    node.replace_input_with(1, ops.constant(ones, f"{PREFIX}ones{len(ones)}"))
    scaled = ops.op("Mul", [y, _broadcast(ops, picked, y)], f"{name}.scaled")
    if fixed is not None:
        node.replace_input_with(2, ops.constant(np.zeros_like(ones), f"{PREFIX}zeros{len(ones)}"))
        scaled = ops.op("Add", [scaled, fixed], f"{name}.with_bias")
    replace_uses(users, y, scaled)


def _broadcast(ops: Ops, picked: ir.Value, y: ir.Value) -> ir.Value:
    """[B, C] as it goes with y [B, ..., C]."""
    rank = len(y.shape or ())
    own = ops.constant(np.array([0, *[1] * (rank - 2), -1]), f"{PREFIX}bias{rank}")
    return ops.op("Reshape", [picked, own], f"{picked.name}.broadcast")


_LEADING: dict[str, dict[str, int]] = {"leading": {"end": -1}, "last": {"start": -1}}


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].value)
