"""Adapters into a graph in one of the modes: what `export_onnx` and `apply_onnx` have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import BaseMismatchError, UsageError
from ..adapter_interface import PREFIX
from ..locate.weight_uses import describe_users
from ..mode_names import (
    BANK,
    DEFAULTS,
    MERGED,
    MODES,
    PAIRED,
    REQUIRED,
    RUNTIME_MODES,
    SWAPPABLE,
    UNMERGED,
)
from . import bank, merged, paired, swappable, unmerged
from .adapter_inputs import require_inputs
from .metadata import write_metadata
from .mode_records import Plan, Written

if TYPE_CHECKING:
    import onnx_ir as ir

_WRITERS = {
    MERGED: merged.write,
    UNMERGED: unmerged.write,
    SWAPPABLE: swappable.write,
    PAIRED: paired.write,
    BANK: bank.write,
}


def write_adapters(plan: Plan, mode: str) -> Written:
    """Write adapters into a graph, and into its metadata what they are.

    Raises:
        UsageError, BaseMismatchError, BadInputError: what the mode cannot write, and layers whose
            weight the graph does not use as that of a linear layer.
    """
    if mode not in RUNTIME_MODES:
        plan = replace(plan, defaults=DEFAULTS[0])
    check_adapter_count(mode, plan.adapters, quantised=plan.has_quantised)
    model = plan.source.model
    inputs, nodes = set(model.graph.inputs), set(model.graph)
    unused = [site for site in plan.every_site if not site.quantised and not site.uses]
    _refuse(
        plan,
        [f"{site.layer}: {site.name} is used by {describe_users(site.value)}" for site in unused],
        expected="weights that a MatMul or Gemm multiplies its input with",
        found=f"{len(unused)} that are used in another way",
        remedy="leave these layers out of the adapter, or export the base another way",
    )
    held = {layer: several[0].name for layer, several in plan.sites.items()}
    held |= {name: str(several[0].value.name) for name, several in plan.saved.items()}
    written = _WRITERS[mode](plan)
    live = _live_values(model)
    dead = [name for name in held if live.isdisjoint(written.changed.get(name, ()))]
    _refuse(
        plan,
        [f"{name}: no output depends on {held[name]}" for name in dead],
        expected="a graph whose outputs depend on every layer and tensor of the adapter",
        found=f"{len(dead)} on which they do not",
        remedy="leave these out of the adapter, or export the base with their outputs",
    )
    inputs = set(model.graph.inputs) - inputs
    if mode in RUNTIME_MODES or plan.has_quantised:
        own = {*model.graph} - nodes | {node for value in inputs for node, _ in value.uses()}
        for node in own:
            node.name = node.name or f"{PREFIX}{node.outputs[0].name}"
        # ONNX Runtime's quantisers make a Gemm an Add and a MatMul of this name, then choose.
        products = {f"{node.name}_MatMul" for node in own if node.op_type == "Gemm"}
        written.nodes = sorted({str(node.name) for node in own} | products)
    write_metadata(plan, mode, written)
    if plan.defaults == REQUIRED:
        require_inputs(model.graph, inputs, written.base)
        if written.expander is not None:
            graph = written.expander.graph
            require_inputs(graph, set(graph.inputs), {})
    return written


def check_mode(mode: str, defaults: str = DEFAULTS[0]) -> None:
    """Refuse an unknown mode, or unknown defaults."""
    for what, given, known in (("mode", mode, MODES), ("defaults", defaults, DEFAULTS)):
        if given not in known:
            raise UsageError(what, expected=" or ".join(known), found=repr(given))


def check_adapter_count(mode: str, adapters: Collection[str], *, quantised: bool = False) -> None:
    """Refuse several adapters where the graph takes one."""
    if len(adapters) > 1 and (mode in (SWAPPABLE, PAIRED) or (quantised and mode == UNMERGED)):
        raise UsageError(
            f"mode {mode}" + (" of a quantised model" if quantised else ""),
            expected="one adapter",
            found=", ".join(adapters),
            remedy="use --mode bank, in which every row of the batch names its adapter"
            + (
                ""
                if mode == UNMERGED
                else "; or export one of them, and load the other ones when the model runs"
            ),
        )


def _refuse(
    plan: Plan, offenders: Sequence[str], *, expected: str, found: str, remedy: str
) -> None:
    """Raise an error if there are offenders."""
    if offenders:
        raise BaseMismatchError(
            plan.source.path, expected=expected, found=found, remedy=remedy, offenders=offenders
        )


def _live_values(model: ir.Model) -> set[ir.Value]:
    """The values that the graph's outputs depend on, also within subgraphs and functions."""
    import onnx_ir as ir

    live: set[ir.Value] = set()
    waiting = list(model.graph.outputs)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in live or node is None:
            live.add(value)
            continue
        live.add(value)
        waiting += [one for one in node.inputs if one is not None]
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                waiting += list(attribute.as_graph().outputs)
            elif attribute.type == ir.AttributeType.GRAPHS:
                waiting += [one for graph in attribute.as_graphs() for one in graph.outputs]
        function = model.functions.get(node.op_identifier())
        waiting += [] if function is None else list(function.outputs)
    return live
