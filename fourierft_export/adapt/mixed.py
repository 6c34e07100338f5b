"""A tensor that differs from row to row: `route` is open, and something reads a layer's weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


class MixedTensor:
    """Stands for a weight or bias of which each row has its own; computing with it is refused.

    Code that only asks for its dtype, device or shape gets the base's (T5 does).

    Args:
        base: the base's tensor.
        where: path of the module.
    """

    def __init__(self, base: Tensor, where: str) -> None:
        self.dtype = base.dtype
        self.device = base.device
        self.shape = base.shape
        self.requires_grad = False
        self.where = where

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What torch calls for any function that is given one of these.

        Raises:
            UsageError: always.
        """
        everything = (*args, *(kwargs or {}).values())
        where = next((a.where for a in everything if isinstance(a, cls)), "a routed module")
        raise UsageError(
            f"module {where} within route",
            expected="a module that is called",
            found="one whose tensors are read, as nn.MultiheadAttention does",
            remedy="run the rows of each adapter by themselves, under activate",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return self.__torch_function__(getattr(torch.Tensor, name), (), (self,))
