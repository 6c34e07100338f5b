"""What the base's linear layers are: two types, two layouts, and their values as numpy arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray[Any, np.dtype[Any]]


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, told by its name so as not to import it."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a layer that FourierFT can adapt."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear or Conv1D."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    in_features, out_features = stored_weight(module).shape
    return out_features, in_features


def stored_weight(linear: nn.Module) -> Tensor:
    """The weight of an nn.Linear or Conv1D, in its own layout."""
    weight = linear.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight of {type(linear).__name__}: {type(weight).__name__}")
    return weight


def to_array(tensor: Tensor) -> Array:
    """A tensor as numpy, bit for bit; bfloat16 as ml_dtypes.bfloat16."""
    host = tensor.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = host.numpy()
    return array


def to_tensor(array: Array) -> Tensor:
    """A numpy array as a tensor of its own, bit for bit."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=True, order="C"))
