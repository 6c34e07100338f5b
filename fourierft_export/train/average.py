"""The mean over the last steps of all that learns: what is scored and written in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .live_adapter import LiveAdapter


class Average(TrainerCallback):  # type: ignore[misc]
    """Means of an adapter's learning parameters over the last `share` of the steps.

    The mean of spectra is the spectrum of the mean delta_W, since delta_W is linear in them
    (equations 2 to 4 of arXiv 2405.03003); for factors, as LoRA has them, this does not hold.
    Buffers, such as the statistics of a batch norm, stay those of the last step.
    """

    def __init__(self, adapter: LiveAdapter, share: float) -> None:
        self.adapter, self.share = adapter, share
        # Of `adapter.learning()`, in its order, float32 or better; empty before those steps.
        self.means: list[Tensor] = []

    def count(self, state: Any) -> int:
        """How many steps the mean is over at this state of the Trainer; below 1 for none."""
        begin: int = state.max_steps - round(self.share * state.max_steps)
        return int(state.global_step) - begin

    @torch.no_grad()
    def on_step_end(self, _args: Any, state: Any, *_others: Any, **_more: Any) -> None:
        """Take in this step's values, with the same weight as those before."""
        count = self.count(state)
        if count == 1:
            self.begin()
        elif count > 1:
            for mean, parameter in zip(self.means, self.adapter.learning(), strict=True):
                mean.lerp_(parameter.to(mean.dtype), 1 / count)

    def begin(self) -> None:
        """Let the means be the parameters as they are now."""
        self.means = [
            parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in self.adapter.learning()
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the parameters hold the means, if there are any yet."""
        if not self.means:
            yield
            return
        before = [parameter.detach().clone() for parameter in self.adapter.learning()]
        try:
            self._put(self.means)
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.adapter.learning(), values, strict=True):
            parameter.copy_(value)
