"""Which adapter each row of a batch uses, at one module; `route` puts it there.

Only `route` imports this: a model that is never routed pays for none of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UsageError

Names = tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """The adapters of a batch's rows, as one module sees them.

    Attributes:
        where: the module's path, for errors.
        names: for each row the adapter that counts there; None for the base, and where the
            adapter does not touch this module.
        groups: names of the adapters that one product can apply together (FourierLinear only).
        num_beams: a batch of `num_beams` times as many rows is one with each row repeated.
        thread: the thread that opened the block.
    """

    where: str
    names: Names
    groups: tuple[tuple[str, ...], ...]
    num_beams: int
    thread: int
    _places: dict[tuple[int, torch.device], dict[str | None, Tensor]] = field(default_factory=dict)

    def of(self, x: Tensor) -> Names:
        """The name for each row of `x`, which are its first dimension.

        Raises:
            UsageError: `x` has another number of rows.
        """
        count, found = len(self.names), x.shape[0] if x.ndim else 0
        if found == count:
            return self.names
        if found == count * self.num_beams:
            return tuple(name for name in self.names for _ in range(self.num_beams))
        expected = f"{count} rows" if self.num_beams == 1 else f"{count} rows or {self.num_beams}x"
        raise UsageError(
            f"module {self.where} within route",
            expected=f"an input whose first dimension are the batch's {expected}",
            found=f"shape {list(x.shape)}",
            remedy="give one name per row (num_beams repeats them for generation); a module that "
            "gets rows and tokens in one dimension, or the batch elsewhere, cannot be routed",
        )

    def places(self, names: Names, device: torch.device) -> dict[str | None, Tensor]:
        """Name -> int64 positions of its rows on `device`, for what `of` returned."""
        key = (len(names), device)
        if key not in self._places:
            positions: dict[str | None, list[int]] = {}
            for i, name in enumerate(names):
                positions.setdefault(name, []).append(i)
            self._places[key] = {
                name: torch.tensor(rows, device=device) for name, rows in positions.items()
            }
        return self._places[key]

    @property
    def content(self) -> int:
        """A number below 2^31 that tells routings apart."""
        return hash((self.names, self.num_beams)) % 2**31


class Routing:
    """What a module knows of the `route` blocks around it.

    Gradient checkpointing runs a module again in the backward pass, when the block may be over:
    such a run uses the rows of the module's latest proper one.

    Attributes:
        now: of the innermost open block, or None.
        latest: of the latest forward pass.
    """

    def __init__(self) -> None:
        self.now: Rows | None = None
        self.latest: Rows | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def current(self) -> Rows | None:
        """The rows that the pass which begins now must use."""
        if _in_backward():
            return self.latest
        self.latest = self.now
        return self.now


def _in_backward() -> bool:
    task: int = torch._C._current_graph_task_id()
    return task != -1


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
        ctx: torch.autograd.function.BackwardCFunction,  # type: ignore[override]
        *grads: Tensor,
    ) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        return grads[0], None


def in_order(parts: Iterable[Tensor], places: Iterable[Tensor]) -> Tensor:
    """Rows of `parts`, put where `places` (which are every row once) say."""
    order = torch.cat(list(places))
    return torch.cat(list(parts)).index_select(0, order.argsort())
