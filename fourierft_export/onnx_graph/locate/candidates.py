"""The constants of a graph that may hold layers, and the checks that turn one into a site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..graph.source import Source, constant_of, constant_shape, constants
from .quantised import QuantisedLinear
from .site import Site, Wanted, compare_site
from .weight_uses import Use, describe_users, find_linear_uses, use_of

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
_SHOWN = 6


def list_candidates(source: Source, linears: Sequence[QuantisedLinear]) -> Iterator[Site]:
    """Yield the constants that may hold layers, as sites of no layer, in the shape of the graph."""
    for value in constants(source.model):
        tensor, shape = constant_of(value), constant_shape(value)
        if tensor is not None and tensor.dtype.name in FLOATS and len(shape) == 2 and value.uses():
            uses = tuple(find_linear_uses(source.model, value))
            yield Site("", value, (shape[0], shape[1]), False, uses)
    for one in linears:
        uses = (use_of(*one.integers, one.node, False),)
        yield Site("", one.value, one.shape, False, uses, quantised=one)


def may_hold(shape: tuple[int, ...], want: Wanted) -> bool:
    """Whether a matrix, in some orientation, is as large as a layer, or as several packed ones."""
    if want.shape is None:
        return True
    outputs, inputs = want.shape
    return any(there[1] == inputs and there[0] >= outputs for there in (shape, shape[::-1]))


def make_site(
    source: Source,
    want: Wanted,
    one: Site,
    uses: tuple[Use, ...],
    *,
    part: tuple[int, int] | None = None,
    transposed: bool | None = None,
) -> Site | str:
    """Make the layer's site of a constant, or say why it cannot be.

    Args:
        one: the constant, as a site of no layer.
        uses: its uses that are this layer.
        part: the layer's outputs (first, last + 1) in a packed weight; None for all of them.
        transposed: the constant holds the weight as (in, out); by default as its uses take it.
    """
    layouts = {use.transposed for use in uses} if transposed is None else {transposed}
    if not layouts and want.shape and want.shape[0] != want.shape[1]:
        layouts = {one.shape != want.shape}  # its name is known: only the layout is open
    if not layouts:
        return f"{one.describe()} is used by {describe_users(one.value)}, not as a layer's weight"
    if len(layouts) != 1:
        return f"{one.describe()} is used in both orientations"
    transposed = layouts.pop()
    total, inputs = reversed(one.shape) if transposed else one.shape
    start, stop = part or (0, total)
    if not start < stop <= total:
        return f"{one.describe()} has no outputs {start} to {stop}"
    shape = stop - start, inputs
    if want.shape is not None and shape != want.shape:
        larger = part is None and inputs == want.shape[1] and total > want.shape[0]
        return (
            f"shape {list(want.shape)} expected, {one.describe()} holds {list(shape)}"
            + (" as (in, out)" if transposed else "")
            + (f"; name the layer's part: {one.name}[START:STOP]" if larger else "")
        )
    site = replace(
        one,
        layer=want.name,
        shape=shape,
        transposed=transposed,
        uses=uses,
        start=None if shape[0] == total else start,
        shared=len(uses) < len(one.value.uses()) or one.value.is_graph_output(),
    )
    return replace(site, verdict=compare_site(source, site, want))


def describe_sites(some: Sequence[Site]) -> str:
    """List the first few sites for a message."""
    more = f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else ""
    return ", ".join(one.describe() for one in some[:_SHOWN]) + more
