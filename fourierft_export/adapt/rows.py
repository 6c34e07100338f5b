"""Which adapter each row of a batch uses, at one module; `route` puts it there.

Only `route` imports this: a model that is never routed pays for none of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UsageError
from .mixed import MixedTensor
from .routed import routed_linear, routed_module

if TYPE_CHECKING:
    from .layer import FourierLinear
    from .saved import AdaptedModule

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
    _places: dict[tuple[int, torch.device, bool], dict[str | None, Tensor]] = field(
        default_factory=dict
    )

    def of(self, x: Tensor, features: int = 0) -> Names:
        """The name for each row of `x`, the first dimension before those of its features.

        Raises:
            UsageError: `x` has another number of rows.
        """
        count, found = len(self.names), x.shape[0] if x.ndim > features else 0
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
        # Tensors made in inference mode cannot be used in training.
        key = (len(names), device, torch.is_inference_mode_enabled())
        if key not in self._places:
            positions: dict[str | None, list[int]] = {}
            for i, name in enumerate(names):
                positions.setdefault(name, []).append(i)
            self._places[key] = {
                name: torch.tensor(rows, device=device) for name, rows in positions.items()
            }
        return self._places[key]

    def linear(self, layer: FourierLinear, x: Tensor) -> Tensor:
        """`routed.routed_linear` of `layer`."""
        result: Tensor = routed_linear(layer, x, self)
        return result

    def module(self, module: AdaptedModule, args: Any, kwargs: Any) -> Any:
        """`routed.routed_module` of `module`."""
        return routed_module(module, self, args, kwargs)

    def weight(self, layer: FourierLinear) -> Any:
        """The weight of `layer`: the base's, or a stand-in where rows have their own."""
        weight: Any = layer.base_layer.weight
        return MixedTensor(weight, self.where) if any(self.names) else weight

    def attribute(self, module: AdaptedModule, name: str) -> Any:
        """An attribute of the modules that answer; a stand-in for a tensor that differs."""
        names = set(self.names)
        if len(names) == 1:
            return getattr(module.under(self.names[0]), name)
        value = getattr(module.original, name)
        own = any(n is not None and name in module.version(n).own for n in names)
        return MixedTensor(value, self.where) if own else value

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

    def __reduce__(self) -> tuple[type[Routing], tuple[()]]:
        # A copy of the model is in no block: none would end there.
        return Routing, ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def current(self, module: FourierLinear | AdaptedModule) -> Rows | None:
        """The rows that the pass of `module` which begins now must use."""
        if _in_backward():
            return self.latest
        self.latest = self.now
        if self.now is None:
            module.routing = None  # from here on as if there never was a block
        return self.now


def _in_backward() -> bool:
    task: int = torch._C._current_graph_task_id()
    return task != -1
