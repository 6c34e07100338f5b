"""Adapters into a graph in one of the modes: what `export_onnx` and `apply_onnx` have in common."""

from __future__ import annotations

import os
from collections.abc import Collection, Container, Mapping, Sequence
from typing import TYPE_CHECKING

from ...bundle.file import Bundle
from ...errors import BaseMismatchError, UsageError
from ..bundle_record import record_bundles
from ..graph.source import Source
from ..locate.saved import Place
from ..locate.site import Site
from ..locate.uses import describe_users
from ..metadata import Written, describe
from ..mode_names import BANK, DEFAULTS, MERGED, MODES, PAIRED, REQUIRED, SWAPPABLE, UNMERGED
from . import bank, merged, paired, swappable, unmerged
from .inputs import require_inputs

if TYPE_CHECKING:
    import onnx_ir as ir


def write_adapters(
    source: Source,
    mode: str,
    adapters: Mapping[str, Bundle],
    sites: Mapping[str, Sequence[Site]],
    saved: Mapping[str, Sequence[Place]],
    *,
    sources: Mapping[str, Bundle],
    defaults: str = DEFAULTS[0],
    absent: Container[str] = (),
) -> Written:
    """Write adapters into a graph, and into its metadata what they are.

    Args:
        source: the graph, which is changed in place.
        mode: one of `mode_names.MODES`.
        adapters: adapter name -> bundle, bound to the graph, scaled by its weight.
        sites: layer -> its sites.
        saved: saved tensor -> its places.
        sources: adapter name -> the bundle as it was given.
        defaults, absent: as in `inputs.adapter_inputs`; nothing to the modes without inputs.

    Raises:
        UsageError, BaseMismatchError, BadInputError: as in the modes, and for layers whose weight
            the graph does not use as that of a linear layer.
    """
    model, where = source.model, source.path
    check_adapter_count(mode, adapters, sites)
    _check_used(where, sites)
    if mode == MERGED:
        written = merged.write(source, adapters, sites, saved)
    elif mode == UNMERGED:
        written = unmerged.write(source, adapters, sites, saved)
    else:
        write = {SWAPPABLE: swappable.write, PAIRED: paired.write, BANK: bank.write}[mode]
        written = write(source, adapters, sites, saved, defaults=defaults, absent=absent)
    _check_reaches_outputs(where, model, sites, written)
    kept = adapters if defaults == DEFAULTS[0] else {}
    content = describe(mode, kept, sources, written)
    for one in (model, written.expander):
        if one is not None:
            one.metadata_props.update(content)
            if kept and mode != MERGED:
                record_bundles(one, {**adapters, **sources}, inputs=mode != UNMERGED)
            if defaults == REQUIRED:
                require_inputs(one.graph, written.base)
    return written


def check_mode(mode: str, defaults: str = DEFAULTS[0]) -> None:
    """Refuse an unknown mode, or unknown defaults.

    Raises:
        UsageError: another word.
    """
    if mode not in MODES:
        raise UsageError("mode", expected=" or ".join(MODES), found=repr(mode))
    if defaults not in DEFAULTS:
        raise UsageError("defaults", expected=" or ".join(DEFAULTS), found=repr(defaults))


def check_adapter_count(
    mode: str, adapters: Collection[str], sites: Mapping[str, Sequence[Site]] | None = None
) -> None:
    """Refuse several adapters where the graph takes one.

    Raises:
        UsageError: naming them.
    """
    quantised = any(one.quantised for several in (sites or {}).values() for one in several)
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


def _check_used(where: str | os.PathLike[str], sites: Mapping[str, Sequence[Site]]) -> None:
    """Refuse weights that no product multiplies with: changing them would change something else."""
    every = [site for several in sites.values() for site in several]
    unused = [site for site in every if not site.quantised and not site.uses]
    if unused:
        raise BaseMismatchError(
            where,
            expected="weights that a MatMul or Gemm multiplies its input with",
            found=f"{len(unused)} that are used in another way",
            remedy="leave these layers out of the adapter, or export the base another way",
            offenders=[f"{s.layer}: {s.name} is used by {describe_users(s.value)}" for s in unused],
        )


def _check_reaches_outputs(
    where: str | os.PathLike[str],
    model: ir.Model,
    sites: Mapping[str, Sequence[Site]],
    written: Written,
) -> None:
    """Refuse a graph whose outputs do not depend on every layer that was adapted."""
    live = _live_values(model)
    offenders = [
        f"{layer}: no output depends on {several[0].name}"
        for layer, several in sites.items()
        if live.isdisjoint(written.changed.get(layer, ()))
    ]
    if offenders:
        raise BaseMismatchError(
            where,
            expected="a graph whose outputs depend on every layer of the adapter",
            found=f"{len(offenders)} layers on which they do not",
            remedy="leave these layers out of the adapter, or export the base with their outputs",
            offenders=offenders,
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
