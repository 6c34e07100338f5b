"""What a base layer must do for an adapter beside it: answer one tensor, pass gradients back.

nn.Linear and Conv1D do both. Of any other layer, quantised ones above all, it is looked at when it
runs: some kernels answer tuples, and some cut the graph without a word.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .linear import describe


def check_answer(layer: nn.Module, answer: Any, out_features: int) -> None:
    """Refuse what x delta_W^T cannot be added to.

    Raises:
        UsageError: not a tensor (..., out_features) of floats.
    """
    if isinstance(answer, Tensor):
        if answer.shape[-1:] == (out_features,) and answer.is_floating_point():
            return
        found = f"shape {list(answer.shape)}, {str(answer.dtype).removeprefix('torch.')}"
    else:
        found = type(answer).__name__
    raise UsageError(
        f"answer of {type(layer).__name__}",
        expected=f"one float tensor whose last dimension is out_features, {out_features}",
        found=found,
        remedy="leave the layer out of target_modules",
    )


def warn_if_gradients_stop(layer: nn.Module, x: Tensor) -> None:
    """Warn when gradients do not reach the layer's input.

    The layer is run once more for it, forward and backward, on `x`.
    """
    if _passes_gradients(layer, x):
        return
    warnings.warn(
        f"{describe(layer)}: no gradient passes through this layer. What lies before it "
        "learns only through the adapter beside it; use weight-only quantisation to train, or "
        "adapt the last layers alone.",
        RuntimeWarning,
        stacklevel=2,
    )


def _passes_gradients(layer: nn.Module, x: Tensor) -> bool:
    # Hooks of its own hide what is saved here from gradient checkpointing, which counts.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        probe = x.detach().requires_grad_()
        answer = layer(probe)
        if not answer.requires_grad:
            return False
        try:
            (gradient,) = torch.autograd.grad(
                answer, probe, torch.ones_like(answer), allow_unused=True
            )
        except RuntimeError:  # training will end with this very message, which says more
            return True
    return gradient is not None


def _same(tensor: Tensor) -> Tensor:
    return tensor
