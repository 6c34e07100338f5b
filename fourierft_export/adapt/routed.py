"""What a routed module answers: each row of the batch with its own adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import UsageError
from ..spectral import torch_ops
from ..spectral.cost import choose_rows_form

if TYPE_CHECKING:
    from .layer import FourierLinear
    from .rows import Names, Rows
    from .saved import AdaptedModule


@torch.compiler.disable  # type: ignore[untyped-decorator]
def routed_linear(layer: FourierLinear, x: Tensor, rows: Rows) -> Tensor:
    """base(x) (each row with its own bias) plus each row's own x delta_W^T.

    Args:
        layer: has the adapters that `rows` names.
        x: (B, ..., in_features), B as `rows` has it.

    Returns:
        (B, ..., out_features), of the dtype that the base layer gives.

    Raises:
        UsageError: another number of rows.
    """
    _refuse_export(rows)
    result = layer.base_output(x)
    if not rows.groups:
        return result
    names = rows.of(x, features=1)
    parts = [part for group in rows.groups for part in _group_delta(layer, x, rows, names, group)]
    dtype = result.dtype
    wide = dtype
    for _, part in parts:
        wide = torch.promote_types(wide, part.dtype)
    places = torch.cat([place for place, _ in parts])
    delta = torch.cat([part.to(wide) for _, part in parts])
    if len(parts) == 1 and len(places) == len(names):
        total = result + delta  # all rows, in their order
    else:
        total = result.to(wide).index_add(0, places, delta)
    return marked(total.to(dtype), rows)


def _group_delta(
    layer: FourierLinear, x: Tensor, rows: Rows, names: Names, group: tuple[str, ...]
) -> list[tuple[Tensor, Tensor]]:
    """(positions, their x delta_W^T) of the rows of adapters that share entries."""
    adapters = [layer.adapter(name) for name in group]
    places = rows.places(names, x.device)
    each = x[0].numel() // layer.in_features
    learns = torch.is_grad_enabled() and any(a.spectrum.requires_grad for a in adapters)
    form = choose_rows_form(
        [len(places[name]) * each for name in group], layer.shape, adapters[0].n_frequency, learns
    )
    if form == "dense":
        parts = []
        for name, adapter in zip(group, adapters, strict=True):
            delta = adapter.delta_weight()
            own = _rows_of(x, places[name], names)
            if not torch.is_autocast_enabled(x.device.type):
                own = own.to(delta.dtype)
            parts.append((places[name], F.linear(own, delta)))
        return parts
    if len(group) == 1:
        place = places[group[0]]
        return [(place, adapters[0].token_delta(_rows_of(x, place, names)))]
    # In the batch's order, so that a batch of one group needs no copy of x.
    member = {name: i for i, name in enumerate(group)}
    place = torch.tensor([i for i, name in enumerate(names) if name in member], device=x.device)
    which = torch.tensor([member[name] for name in names if name in member], device=x.device)
    dtype = adapters[0].spectrum.dtype
    for adapter in adapters:
        dtype = torch.promote_types(dtype, adapter.spectrum.dtype)
    scalings = [float(adapter.origin.scaling) for adapter in adapters]
    scaling = scalings[0]
    with torch.autocast(x.device.type, enabled=False):
        spectra = torch.stack([adapter.spectrum.to(dtype) for adapter in adapters])
        if any(other != scaling for other in scalings):
            wide = torch.promote_types(dtype, torch.float32)
            factors = torch.tensor(scalings, dtype=wide, device=x.device)
            spectra, scaling = spectra.to(wide) * factors[:, None], 1.0
        per_row = spectra.index_select(0, which)
        per_row = per_row.reshape(len(which), *(1,) * (x.ndim - 2), -1)
        own = _rows_of(x, place, names)
        delta = torch_ops.token_delta(own, per_row, adapters[0].entries, layer.shape, scaling)
    return [(place, delta)]


def _rows_of(x: Tensor, places: Tensor, names: Names) -> Tensor:
    """Rows of `x` at `places`, which rise; `x` itself if that is all of them."""
    return x if len(places) == len(names) else x.index_select(0, places)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def routed_module(
    module: AdaptedModule, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What each row's own version answers to its rows of every tensor among the arguments.

    Tensors may be within tuples, lists and dictionaries.

    Raises:
        UsageError: another number of rows; several versions, and there is no tensor among the
            arguments, or the answer is not one tensor with a row for each.
    """
    _refuse_export(rows)
    if len(set(rows.names)) == 1:
        return module.under(rows.names[0])(*args, **kwargs)
    given = (args, kwargs)
    first = next((leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)), None)
    if first is None:
        raise UsageError(
            f"module {rows.where} within route",
            expected="a tensor among the arguments, with a row for each row of the batch",
            found=", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "none",
            remedy="run the rows of each adapter by themselves, under activate",
        )
    names = rows.of(first)
    places = rows.places(names, first.device)
    parts: list[Tensor] = []
    for name, place in places.items():

        def own(value: Tensor, place: Tensor = place) -> Tensor:
            mine = value.ndim and value.shape[0] == len(names)
            return value.index_select(0, place.to(value.device)) if mine else value

        own_args, own_kwargs = tree_map_only(Tensor, own, given)
        answer = module.under(name)(*own_args, **own_kwargs)
        if not isinstance(answer, Tensor) or answer.shape[:1] != place.shape:
            raise UsageError(
                f"module {rows.where} within route",
                expected="an answer that is one tensor with a row for each row of the batch",
                found=f"shape {list(answer.shape)} for {len(place)} rows"
                if isinstance(answer, Tensor)
                else type(answer).__name__,
                remedy="run the rows of each adapter by themselves, under activate",
            )
        parts.append(answer)
    return marked(in_order(parts, places.values()), rows)


def _refuse_export(rows: Rows) -> None:
    if torch.compiler.is_exporting():
        raise UsageError(
            f"module {rows.where} within route",
            expected="a model that is run",
            found="one that is exported",
            remedy="leave the block; export_onnx(mode='bank') takes adapters row by row",
        )


def marked(result: Tensor, rows: Rows) -> Tensor:
    """`result`, with the routing on record in its graph.

    Where a checkpointed region was run again under another routing, torch finds that the tensors
    it saved have other sizes, and raises its CheckpointError instead of giving wrong gradients.
    """
    if not torch.is_grad_enabled() or not result.requires_grad:
        return result
    with_mark: Tensor = _Mark.apply(result, rows.content)  # type: ignore[no-untyped-call]
    return with_mark


class _Mark(torch.autograd.Function):
    """The identity; saves an empty tensor whose size is the routing's number."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, content: int) -> Tensor:
        ctx.save_for_backward(x.new_empty(0, content))
        return x.view_as(x)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.BackwardCFunction,
        *grads: Tensor,
    ) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        return grads[0], None


def in_order(parts: Iterable[Tensor], places: Iterable[Tensor]) -> Tensor:
    """Rows of `parts`, put where `places` (which are every row once) say."""
    order = torch.cat(list(places))
    return torch.cat(list(parts)).index_select(0, order.argsort())
