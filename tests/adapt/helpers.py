"""What the tests of live models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fourierft_export as ff
from fourierft_export.spectral.delta import reference_delta

MakeModel = Callable[[str], nn.Module]


def output(model: Any, tokens: Tensor) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    result = model(input_ids=tokens)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def move(model: nn.Module, by: float = 0.1) -> None:
    """Adds random numbers to all that learns."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape).to(parameter.dtype)


def adapted(model: Any, name: str = "default", **fields: Any) -> Any:
    """The model with an adapter whose every tensor is random, drawn from its name."""
    torch.manual_seed(sum(map(ord, name)))
    usual = {"n_frequency": 21, "scaling": 30.0, "random_loc_seed": 5}
    ff.inject(model, ff.FourierFTConfig(**(usual | fields)), name)
    move(model)
    return model


def exact_delta(layer: ff.FourierLinear, *names: str) -> Tensor:
    """The sum of these adapters' delta_W (by default of the active ones), in float64."""
    total = torch.zeros(layer.shape, dtype=torch.float64)
    for adapter in map(layer.adapter, names or layer.active):
        spectrum = adapter.spectrum.detach().double().numpy()
        delta = reference_delta(spectrum, adapter.host_entries, layer.shape, adapter.origin.scaling)
        total += torch.from_numpy(delta)
    return total


def structure(model: nn.Module) -> list[tuple[str, type, int]]:
    """Name, type and identity of every module."""
    return [(name, type(module), id(module)) for name, module in model.named_modules()]
