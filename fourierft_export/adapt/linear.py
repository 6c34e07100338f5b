"""What a base's linear layers are, and their values as numpy arrays.

Two types are known through and through: nn.Linear and transformers' Conv1D, holding their weight
as a plain float matrix. Any other module that maps in_features to out_features can carry an
adapter as well, quantised layers above all; delta_W is then added to its output, never to its
weight, for there is no W of floats to add it to.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..types import Array

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REMEDY = (
    "capture the adapter and merge it into the unquantised checkpoint, or put it on a dequantised "
    "model; here it can only run beside the layer"
)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, told by its name so as not to import it."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def is_common_linear(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear (quantised or not) or a Conv1D: what PEFT takes."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a layer that FourierFT can adapt.

    That is an nn.Linear, a Conv1D, or anything that is called and whose `in_features` and
    `out_features` are positive integers.
    """
    if is_common_linear(module):
        return True
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    counted = all(type(size) is int and size > 0 for size in sizes)
    # Scripted modules have a forward that their class does not tell.
    return counted and getattr(type(module), "forward", None) is not nn.Module.forward


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a layer that `is_linear` accepts."""
    if is_conv1d(module):
        in_features, out_features = module.weight.shape  # type: ignore[misc]
        return int(out_features), int(in_features)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def float_weight(linear: nn.Module) -> Tensor | None:
    """The weight of an nn.Linear or Conv1D as a plain float matrix, or None if it has none.

    Quantised layers have none, whatever their weight says of itself: torchao's tensors call
    themselves float32 but hold integers, bitsandbytes' hold integers under an nn.Linear, and
    float8 weights need a scale that lies elsewhere.
    """
    if not is_common_linear(linear):
        return None
    weight = linear.weight
    if not isinstance(weight, Tensor) or not is_plain(weight):
        return None
    return weight


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor is a dense one of floats that can be computed with and trained."""
    kind = type(weight)
    # Besides the two usual types, torch's own (DTensor, the fake tensors of tracing) hold floats.
    known = kind in (Tensor, nn.Parameter) or kind.__module__.startswith("torch.")
    return known and weight.dtype in _FLOATS and weight.layout == torch.strided


def stored_weight(linear: nn.Module) -> Tensor:
    """The weight of an nn.Linear or Conv1D, in its own layout.

    Raises:
        UsageError: the layer has no plain float weight (`float_weight`).
    """
    weight = float_weight(linear)
    if weight is None:
        raise UsageError(
            f"weight of a layer of type {type(linear).__name__}",
            expected="a plain float matrix, to which a change can be added",
            found=describe(linear),
            remedy=_REMEDY,
        )
    return weight


def check_mergeable(where: str, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that have no plain float weight to add delta_W to.

    Args:
        where: what was asked for.
        layers: path -> the base's layer.

    Raises:
        UsageError: all such layers listed.
    """
    odd = [
        f"{path}: {describe(linear)}"
        for path, linear in layers.items()
        if float_weight(linear) is None
    ]
    if odd:
        raise UsageError(
            where,
            expected="layers with plain float weights",
            found=f"{len(odd)} of {len(layers)} that are quantised or of another kind",
            remedy=_REMEDY,
            offenders=odd,
        )


def describe(linear: nn.Module) -> str:
    """What a layer is, for messages: its type, and its weight's type and dtype."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor):
        return type(linear).__name__
    dtype = str(weight.dtype).removeprefix("torch.")
    kind = type(weight).__name__
    held = dtype if kind in ("Tensor", "Parameter") else f"{kind} ({dtype})"
    return f"{type(linear).__name__} with a weight of {held}"


def layer_device(linear: nn.Module) -> torch.device:
    """Where a layer's tensors are: that of its weight, else of its first tensor, else the CPU."""
    weight = getattr(linear, "weight", None)
    tensors = (*linear.parameters(), *linear.buffers())
    first = weight if isinstance(weight, Tensor) else next(iter(tensors), None)
    return torch.device("cpu") if first is None else first.device


def to_array(tensor: Tensor) -> Array:
    """A tensor as numpy, bit for bit; bfloat16 as ml_dtypes.bfloat16.

    A tensor that FSDP2 spread over processes is gathered; all of them must ask for it then.
    """
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    host = whole.detach().cpu().contiguous()
    # Unlike Tensor.numpy, this leaves the storage resizable, which FSDP2 relies on.
    if host.dtype == torch.bfloat16:
        return np.from_dlpack(host.view(torch.int16)).view(ml_dtypes.bfloat16)
    array: Array = np.from_dlpack(host)
    return array


def to_tensor(array: Array) -> Tensor:
    """A numpy array as a tensor of its own, bit for bit."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=True, order="C"))
