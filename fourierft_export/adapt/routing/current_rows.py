"""Which adapter each row of a batch uses, in the current thread or asynchronous task."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UsageError

Names = tuple[str | None, ...]
ONE_BY_ONE = "run the rows of each adapter by themselves, under activate"


@dataclass(frozen=True, eq=False)
class RowAdapters:
    """The adapters of a batch's rows, as one module needs them.

    Attributes:
        where: the module's path, for errors.
        names: for each row the adapter that it uses; None for the base, and where the adapter
            does not touch this module.
        groups: names of the adapters that one product can apply together (FourierLinear only).
        num_beams: a batch of `num_beams` times as many rows is one with each row repeated.
    """

    where: str
    names: Names
    groups: tuple[tuple[str, ...], ...]
    num_beams: int
    _positions: dict[tuple[int, torch.device, bool], dict[str | None, Tensor]] = field(
        default_factory=dict
    )

    def names_for(self, x: Tensor, features: int = 0) -> Names:
        """The name for each row of `x`, whose last `features` dimensions hold no rows."""
        count, found = len(self.names), x.shape[0] if x.ndim > features else 0
        if found == count:
            return self.names
        if found == count * self.num_beams:
            return tuple(name for name in self.names for _ in range(self.num_beams))
        expected = f"{count} rows" if self.num_beams == 1 else f"{count} rows or {self.num_beams}x"
        raise UsageError(
            f"module {self.where} within route",
            expected=f"an input whose first dimension is the batch's {expected}",
            found=f"shape {list(x.shape)}",
            remedy="give one name per row (num_beams repeats them for generation); a module that "
            "gets rows and tokens in one dimension, or the batch elsewhere, cannot be routed",
        )

    def positions(self, names: Names, device: torch.device) -> dict[str | None, Tensor]:
        """Name -> int64 positions of its rows on `device`, for what `names_for` returned."""
        # Tensors made in inference mode cannot be used in training.
        key = (len(names), device, torch.is_inference_mode_enabled())
        if key not in self._positions:
            found: dict[str | None, list[int]] = {}
            for i, name in enumerate(names):
                found.setdefault(name, []).append(i)
            self._positions[key] = {
                name: torch.tensor(rows, device=device) for name, rows in found.items()
            }
        return self._positions[key]

    @property
    def content(self) -> int:
        """A number below 2^31, different for different row lists (but for hash collisions)."""
        return hash((self.names, self.num_beams)) % 2**31


class OpenBlocks:
    """What one wrapped module knows of the `route` blocks around it, in any thread.

    Gradient checkpointing runs a module again in the backward pass, when the block may be over:
    such a run uses the rows of the thread's latest pass.

    Attributes:
        count: blocks that are open on the module.
        latest: thread -> rows of its latest pass, for threads where that was within a block.
    """

    def __init__(self) -> None:
        self.count = 0
        self.latest: dict[int, RowAdapters] = {}

    def __reduce__(self) -> tuple[type[OpenBlocks], tuple[()]]:
        return OpenBlocks, ()  # a copy of the model is in no block: none would end there

    @property
    def may_apply(self) -> bool:
        """Whether `current_rows` must be called; False for a model that is never routed."""
        return self.count > 0 or bool(self.latest)


# Wrapped module -> its rows. Each thread, and each asynchronous task, has a separate value.
_rows: ContextVar[Mapping[nn.Module, RowAdapters] | None] = ContextVar("rows", default=None)
_lock = threading.Lock()


@contextmanager
def open_block(plans: Mapping[nn.Module, tuple[OpenBlocks, RowAdapters]]) -> Iterator[None]:
    """Within the block, passes of these modules in this thread or task use these rows."""
    before = _rows.get()
    _rows.set({**(before or {}), **{module: rows for module, (_, rows) in plans.items()}})
    with _lock:
        for blocks, _ in plans.values():
            blocks.count += 1
    try:
        yield
    finally:
        with _lock:
            for blocks, _ in plans.values():
                blocks.count -= 1
                if not torch.is_grad_enabled():  # no backward pass will come
                    blocks.latest.pop(threading.get_ident(), None)
        _rows.set(before)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def current_rows(module: nn.Module, blocks: OpenBlocks) -> RowAdapters | None:
    """The rows that the pass of `module` that begins now must use; None outside of `route`."""
    thread = threading.get_ident()
    if torch._C._current_graph_task_id() != -1:  # within a backward pass
        if isinstance(threading.current_thread(), threading._DummyThread):  # of a GPU
            return next(reversed(blocks.latest.values()), None)
        return blocks.latest.get(thread)
    rows = rows_here(module)
    if blocks.count and getattr(module, "_is_replica", False):
        raise UsageError(
            "route",
            expected="a model that runs in the thread of the block",
            found="nn.DataParallel, which runs parts of the batch in other threads",
            remedy="route the model itself, or use DistributedDataParallel",
        )
    blocks.latest.pop(thread, None)
    if rows is not None:
        blocks.latest[thread] = rows
    return rows


def rows_here(module: nn.Module) -> RowAdapters | None:
    """The rows of the innermost block around `module` in this thread or task."""
    return (_rows.get() or {}).get(module)
