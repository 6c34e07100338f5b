"""Mode swappable: the adapter as inputs of the graph, which adds it beside each linear layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...types import Array
from ..graph.ops import FLOAT32, Ops
from ..groups import BASE_PREFIX, Group, Interface
from ..locate.linears import HasEnds, SavedSite
from .side_branch import Frequencies, SideBranches

if TYPE_CHECKING:
    import onnx_ir as ir


def write_swappable(
    model: ir.Model,
    linears: Mapping[str, Sequence[HasEnds]],
    interface: Interface,
    defaults: Mapping[str, Array],
    saved: Iterable[SavedSite] = (),
    base_saved: Mapping[str, Array] | None = None,
) -> None:
    """Give a graph the inputs of `interface`, and add what they say to its linear layers.

    Args:
        model: opset 18 or newer; changed in place.
        linears: layer -> its MatMul or Gemm nodes (input 0 is x, output 0 is y), or any node whose
            first input and output are the layer's, such as MatMulNBits.
        interface: every layer of its groups is in `linears`.
        defaults: input name -> default, for every input (`groups.spectral_feeds`, `base_feeds`,
            and the saved tensors).
        saved: where the saved tensors are; those of the interface.
        base_saved: the base's own, kept as constants beside them, if the defaults are others.
    """
    ops = Ops(model.graph)
    saved_inputs(ops, interface, defaults, saved, base_saved or {})
    branches = SideBranches(ops)
    for group in interface.groups:
        frequencies = _group(ops, branches, group, defaults)
        for row, layer in enumerate(group.layers):
            for number, node in enumerate(linears[layer]):
                name = f"{layer}.adapter" + (f".{number}" if number else "")
                x, y = node.inputs[0], node.outputs[0]
                if x is not None:
                    branches.add(frequencies, row, x, y, name=name)
    branches.finish()


def _group(
    ops: Ops, branches: SideBranches, group: Group, defaults: Mapping[str, Array]
) -> Frequencies:
    spectrum, entries, scaling = group_inputs(ops, group, defaults)
    if group.dtype != "float32":
        spectrum = ops.op("Cast", [spectrum], f"{group.spectrum}.float32", to=FLOAT32)
    name = f"fourierft.group.{group.index}"
    return branches.group(spectrum, entries, scaling, group.shape, name=name)


def group_inputs(
    ops: Ops, group: Group, defaults: Mapping[str, Array], before: Sequence[str] = ()
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The three inputs of a group; `before` are symbolic sizes in front of the group's own."""
    count = len(group.layers)
    shapes: tuple[tuple[str, list[int | str]], ...] = (
        (group.spectrum, [*before, count, group.size]),
        (group.entries, [*before, group.size, 2]),
        (group.scaling, [*before, count]),
    )
    spectrum, entries, scaling = (
        ops.overridable(defaults[name], name, shape) for name, shape in shapes
    )
    return spectrum, entries, scaling


def saved_inputs(
    ops: Ops,
    interface: Interface,
    defaults: Mapping[str, Array],
    sites: Iterable[SavedSite],
    base_saved: Mapping[str, Array],
) -> None:
    """Make saved tensors inputs under their own names, in the layout of the model."""
    at: dict[str, list[SavedSite]] = {}
    for site in sites:
        at.setdefault(site.name, []).append(site)
    for tensor in interface.saved:
        users = [(use, site) for site in at[tensor.name] for use in tuple(site.value.uses())]
        for site in at[tensor.name]:
            take_out(ops, site.value)
        default = defaults[tensor.name]
        value = ops.overridable(default, tensor.name)
        for (node, index), site in users:
            fed = ops.op("Transpose", [value], f"{tensor.name}.turned") if site.turned else value
            node.replace_input_with(index, fed)
        if tensor.name in base_saved and not _same(base_saved[tensor.name], default):
            ops.initializer(base_saved[tensor.name], BASE_PREFIX + tensor.name)


def take_out(ops: Ops, value: ir.Value) -> None:
    """Remove an initializer, and free its name for an input."""
    name = str(value.name)
    ops.graph.initializers.pop(name)
    ops.release(name)
    if value.is_graph_input():
        ops.graph.inputs.remove(value)


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a, b))
