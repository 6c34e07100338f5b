"""The linear layers of a base: their types, shapes and weights, and these as numpy arrays.

nn.Linear and transformers' Conv1D hold their weight as a plain float matrix. Any other module that
maps in_features to out_features can have an adapter as well, quantised layers above all; delta_W
is then added to the output of the layer and never to its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from ..errors import UsageError
from ..types import Array

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, recognised by its name: no import is needed."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """Whether FourierFT can adapt `module`: nn.Linear, Conv1D, or another layer with two sizes."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    counted = all(type(size) is int and size > 0 for size in sizes)
    # Scripted modules have a forward that their class does not show.
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
    weight = linear.weight if isinstance(linear, nn.Linear) or is_conv1d(linear) else None
    return weight if isinstance(weight, Tensor) and is_plain(weight) else None


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor is a dense one of floats that can be computed with and trained."""
    kind = type(weight)
    # Besides the two usual types, torch's own (DTensor, the fake tensors of tracing) hold floats.
    known = kind in (Tensor, nn.Parameter) or kind.__module__.startswith("torch.")
    return known and weight.dtype in _FLOATS and weight.layout == torch.strided


def stored_weight(linear: nn.Module) -> Tensor:
    """The weight of an nn.Linear or Conv1D, in its own layout; UsageError if it has none."""
    weight = float_weight(linear)
    if weight is None:
        check_mergeable("weight", {"the layer": linear})
    return cast(Tensor, weight)


def check_mergeable(where: str, layers: Mapping[str, nn.Module], parameters: bool = False) -> None:
    """Refuse layers (by path) that have no plain float weight to add delta_W to.

    With `parameters`, also those whose weight is no parameter but is computed from others.
    """
    odd = [f"{p}: {describe(m)}" for p, m in layers.items() if float_weight(m) is None]
    if odd:
        raise UsageError(
            where,
            expected="layers with plain float weights",
            found=f"{len(odd)} of {len(layers)} that are quantised or of another kind",
            remedy="capture the adapter and merge it into the unquantised checkpoint, or put it on "
            "a dequantised model; here it can only be added to the output of the layer",
            offenders=odd,
        )
    computed = [path for path, linear in layers.items() if "weight" not in linear._parameters]
    if parameters and computed:
        raise UsageError(
            where,
            expected="layers whose weight is a parameter",
            found=f"{len(computed)} whose weight is computed (weight_norm, parametrizations)",
            remedy="call remove_parametrizations or remove_weight_norm of torch.nn.utils on them",
            offenders=computed,
        )


def without_parametrizations(path: str, linear: nn.Module) -> nn.Module:
    """The layer, or a plain copy where torch computes its weight from others (weight_norm)."""
    if not parametrize.is_parametrized(linear):
        if float_weight(linear) is not None:  # a hook that computes the weight is not copied
            check_mergeable("export", {path: linear}, parameters=True)
        return linear
    plain = copy.deepcopy(linear)
    # torch's remove_parametrizations would change the class, which the copy shares.
    plain.__class__ = type(linear).__bases__[0]
    for name in plain._modules.pop("parametrizations")._modules:  # type: ignore[union-attr]
        value = getattr(linear, name).detach()
        plain._parameters[name] = nn.Parameter(value, requires_grad=False)
    return plain


def is_bare(linear: nn.Module) -> bool:
    """Whether calling the layer is nothing but x W^T + b: no replaced forward, no hooks.

    PEFT always calls the base layer, so whatever hangs on it must run here, too.
    """
    plain = type(linear) in _PLAIN_LINEAR or is_conv1d(linear)
    return plain and "forward" not in linear.__dict__ and not has_hooks(linear)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks: its own, or those of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def check_output(layer: nn.Module, output: Any, out_features: int) -> None:
    """Refuse an output of a layer of unknown type to which x delta_W^T cannot be added."""
    found = type(output).__name__
    if isinstance(output, Tensor):
        if output.shape[-1:] == (out_features,) and output.is_floating_point():
            return
        found = f"shape {list(output.shape)}, {str(output.dtype).removeprefix('torch.')}"
    raise UsageError(
        f"output of {type(layer).__name__}",
        expected=f"one float tensor whose last dimension is out_features, {out_features}",
        found=found,
        remedy="leave the layer out of target_modules",
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


def layer_device(module: nn.Module) -> torch.device:
    """Where a layer's tensors are: that of its weight, else of its first tensor, else the CPU."""
    weight = getattr(module, "weight", None)
    tensors = (*module.parameters(), *module.buffers())
    first = weight if isinstance(weight, Tensor) else next(iter(tensors), None)
    return torch.device("cpu") if first is None else first.device


def to_array(tensor: Tensor) -> Array:
    """A tensor as numpy, bit for bit; bfloat16 as ml_dtypes.bfloat16.

    A tensor that FSDP2 spread over processes is gathered; all of them must call this then.
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
    """A copy of a numpy array as a tensor, bit for bit."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=True, order="C"))
