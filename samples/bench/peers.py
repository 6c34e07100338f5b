"""PEFT's own FourierFT layer, and ours, around one linear layer with the same spectrum."""

from __future__ import annotations

import peft
import torch
from peft.tuners.fourierft.layer import FourierFTLinear
from torch import Tensor, nn

import fourierft_export as ff
from fourierft_export.adapt.fourier_linear import FourierLinear

SEED = 2024
SCALING = 150.0


def linear(out_size: int, in_size: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A frozen layer with weights of the usual size."""
    layer = nn.Linear(in_size, out_size, bias=False, device="meta").to_empty(device="cpu")
    nn.init.normal_(layer.weight, std=0.02)
    return layer.to(dtype).requires_grad_(False)


def peft_layer(
    base: nn.Linear, n_frequency: int, spectrum: Tensor | None = None
) -> FourierFTLinear:
    """PEFT's layer around `base`."""
    config = peft.FourierFTConfig(
        n_frequency=n_frequency, scaling=SCALING, random_loc_seed=SEED, target_modules=["0"]
    )
    model = peft.get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    if spectrum is not None:
        layer.fourierft_spectrum["default"].data = spectrum.clone()
    return layer


def our_layer(base: nn.Linear, spectrum: Tensor) -> FourierLinear:
    """The toolkit's layer around `base`."""
    config = ff.FourierFTConfig(
        n_frequency=len(spectrum), scaling=SCALING, random_loc_seed=SEED, target_modules=["0"]
    )
    layer = ff.inject(nn.Sequential(base), config)[0]
    layer.adapter("default").spectrum.data = spectrum.clone()
    return layer
