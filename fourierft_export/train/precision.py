"""What the model computes in. What learns is float32 whatever happens here."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..adapt.modules import base_modules, original


class Precision:
    """Mixed precision of a run: autocast, and for float16 a scale that keeps gradients from zero.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        device: where the model is.

    Attributes:
        scaler: torch's GradScaler; does nothing but for float16.
    """

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = device
        scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    @property
    def is_mixed(self) -> bool:
        """Whether it is anything but float32."""
        return self.dtype != torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the model runs."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.is_mixed)


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """Make what learns float32 where the base is of half precision: small steps would be lost."""
    for parameter in parameters:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def cast_frozen_linears(model: nn.Module, dtype: torch.dtype) -> int:
    """Cast float32 weights of frozen linear layers once, as autocast would on every call.

    Results are the same; memory and time are saved. Weights that other modules use as well stay.

    Args:
        model: with an adapter on it; changed in place.
        dtype: autocast's.

    Returns:
        How many layers were cast.
    """
    modules = [original(module) for _, module in base_modules(model)]
    holders: dict[int, int] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    cast = 0
    for module in modules:
        weight = module._parameters.get("weight")
        if type(module) is not nn.Linear or weight is None or holders[id(weight)] > 1:
            continue
        if weight.requires_grad or weight.dtype != torch.float32:
            continue
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        cast += 1
    return cast
