"""Run a wrapped module so that each row of the batch gets its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ...errors import UsageError
from ...spectral import torch_ops
from ...spectral.cost import choose_rows_form
from ..layer_adapter import LayerAdapter, autocast_is_on
from .current_rows import ONE_BY_ONE, Names, RowAdapters


@torch.compiler.disable  # type: ignore[untyped-decorator]
def add_row_deltas(result: Tensor, x: Tensor, adapters: nn.ModuleDict, rows: RowAdapters) -> Tensor:
    """The base layer's `result` plus each row's own x delta_W^T.

    Args:
        result: (B, ..., out_features), what the base layer returns (each row with its own bias).
        x: (B, ..., in_features), B as `rows` has it.
        adapters: name -> `LayerAdapter`, those that `rows` names among them.
        rows: which adapter each row uses.
    """
    _refuse_export(rows)
    if not rows.groups:
        return result
    names = rows.names_for(x, features=1)
    parts = []
    for group in rows.groups:
        members = {name: adapters[name] for name in group}
        parts += _group_deltas(x, rows, names, members)  # type: ignore[arg-type]
    dtype = result.dtype
    wide = dtype
    for _, part in parts:
        wide = torch.promote_types(wide, part.dtype)
    positions = torch.cat([position for position, _ in parts])
    delta = torch.cat([part.to(wide) for _, part in parts])
    if len(parts) == 1 and len(positions) == len(names):
        total = result + delta  # all rows, in their order
    else:
        total = result.to(wide).index_add(0, positions, delta)
    return _record_rows(total.to(dtype), rows)


def _group_deltas(
    x: Tensor, rows: RowAdapters, names: Names, members: dict[str, LayerAdapter]
) -> list[tuple[Tensor, Tensor]]:
    """(positions, their x delta_W^T) of the rows of adapters that share entries."""
    adapters = list(members.values())
    first = adapters[0]
    positions = rows.positions(names, x.device)

    def select(chosen: Tensor) -> Tensor:  # rising positions; x itself if that is all of them
        return x if len(chosen) == len(names) else x.index_select(0, chosen)

    each = x[0].numel() // first.shape[1]
    learns = torch.is_grad_enabled() and any(a.spectrum.requires_grad for a in adapters)
    counts = [len(positions[name]) * each for name in members]
    if choose_rows_form(counts, first.shape, first.n_frequency, learns) == "dense":
        parts = []
        for name, adapter in members.items():
            delta = adapter.delta_weight()
            own = select(positions[name])
            if not autocast_is_on(x):
                own = own.to(delta.dtype)
            parts.append((positions[name], F.linear(own, delta)))
        return parts
    if len(members) == 1:
        (only,) = (positions[name] for name in members)
        return [(only, first.token_delta(select(only)))]
    # In the batch's order, so that a batch of one group needs no copy of x.
    number = {name: i for i, name in enumerate(members)}
    position = torch.tensor([i for i, n in enumerate(names) if n in number], device=x.device)
    which = torch.tensor([number[n] for n in names if n in number], device=x.device)
    dtype = first.spectrum.dtype
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
        delta = torch_ops.token_delta(
            select(position), per_row, first.entries, first.shape, scaling
        )
    return [(position, delta)]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_by_rows(
    version: Callable[[str | None], Callable[..., Any]],
    rows: RowAdapters,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call each adapter's version with its own rows of every tensor among the arguments.

    `version` gives what to call under an adapter's name, or None for the base. The results must be
    one tensor each; tensors among the arguments may lie in tuples, lists and dictionaries.
    """
    _refuse_export(rows)
    if len(set(rows.names)) == 1:
        return version(rows.names[0])(*args, **kwargs)
    given = (args, kwargs)
    first = next((leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)), None)
    if first is None:
        found = ", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "none"
        raise _refusal(rows, "a tensor among the arguments, with a row for each row", found)
    names = rows.names_for(first)
    positions = rows.positions(names, first.device)
    parts: list[Tensor] = []
    for name, position in positions.items():

        def own(value: Tensor, position: Tensor = position) -> Tensor:
            has_rows = value.ndim and value.shape[0] == len(names)
            return value.index_select(0, position.to(value.device)) if has_rows else value

        own_args, own_kwargs = tree_map_only(Tensor, own, given)
        answer = version(name)(*own_args, **own_kwargs)
        if not isinstance(answer, Tensor) or answer.shape[:1] != position.shape:
            found = type(answer).__name__
            if isinstance(answer, Tensor):
                found = f"shape {list(answer.shape)} for {len(position)} rows"
            raise _refusal(rows, "a result that is one tensor with a row for each row", found)
        parts.append(answer)
    order = torch.cat(list(positions.values()))
    return _record_rows(torch.cat(parts).index_select(0, order.argsort()), rows)


def attribute_by_rows(
    version: Callable[[str | None], Any], attribute: str, rows: RowAdapters
) -> Any:
    """An attribute of the module that each row uses.

    What all versions share is returned itself. A method or child module becomes one that splits
    the rows when it is called; a tensor becomes a `PerRowTensor`; other values must be equal.
    """
    values = [getattr(version(name), attribute) for name in dict.fromkeys(rows.names)]
    first = values[0]
    if all(value is first for value in values):
        return first
    if isinstance(first, Tensor):
        return PerRowTensor(first, rows.where)
    if callable(first):
        return PerRowCallable(lambda name: getattr(version(name), attribute), rows)
    if all(type(value) is type(first) and value == first for value in values):
        return first
    raise _refusal(rows, f"an attribute {attribute!r} with one value", "others for other rows")


class PerRowCallable:
    """Stands for a method or child module of which each row has its own."""

    def __init__(self, version: Callable[[str | None], Any], rows: RowAdapters) -> None:
        self._version = version
        self._rows = rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Each row's own result."""
        return call_by_rows(self._version, self._rows, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return attribute_by_rows(self._version, name, self._rows)


class PerRowTensor:
    """Stands for a weight or bias of which each row has its own; computing with it is refused.

    Code that only reads its dtype, device or shape gets the base's (T5 does).
    """

    def __init__(self, base: Tensor, where: str) -> None:
        self.dtype = base.dtype
        self.device = base.device
        self.shape = base.shape
        self.requires_grad = False
        self.where = where

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch calls for any function that is given one of these: it is refused."""
        everything = (*args, *(kwargs or {}).values())
        where = next((a.where for a in everything if isinstance(a, cls)), "a routed module")
        raise UsageError(
            f"module {where} within route",
            expected="a module that is called",
            found="one whose tensors are read, as nn.MultiheadAttention does",
            remedy=ONE_BY_ONE,
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return self.__torch_function__(getattr(torch.Tensor, name), (), (self,))


def _refusal(rows: RowAdapters, expected: str, found: str) -> UsageError:
    where = f"module {rows.where} within route"
    return UsageError(where, expected=expected, found=found, remedy=ONE_BY_ONE)


def _refuse_export(rows: RowAdapters) -> None:
    if torch.compiler.is_exporting():
        raise UsageError(
            f"module {rows.where} within route",
            expected="a model that is run",
            found="one that is exported",
            remedy="leave the block; export_onnx(mode='bank') takes adapters row by row",
        )


def _record_rows(result: Tensor, rows: RowAdapters) -> Tensor:
    """`result`, with the rows' adapters recorded in its autograd graph.

    Where a checkpointed region was run again under other rows, torch finds that the tensors it
    saved have other sizes, and raises its CheckpointError instead of giving wrong gradients.
    """
    if not torch.is_grad_enabled() or not result.requires_grad:
        return result
    recorded: Tensor = _RecordRows.apply(result, rows.content)  # type: ignore[no-untyped-call]
    return recorded


class _RecordRows(torch.autograd.Function):
    """The identity; saves an empty tensor whose size is `RowAdapters.content`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, content: int) -> Tensor:
        ctx.save_for_backward(x.new_empty(0, content))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        return grads[0], None
