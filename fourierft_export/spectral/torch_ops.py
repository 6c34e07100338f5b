"""The spectral forms for torch tensors, on any device, differentiable.

Eagerly these are autograd functions; under `torch.compile` the same kernels are custom operators
(`torch_compiled`), which eagerly would cost 30 us more a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import delta as numpy_delta
from . import torch_compiled
from . import torch_kernels as kernels
from .cost import choose_form
from .token import check_features

__all__ = ["choose_form", "delta_weight", "merge_delta_weights", "merged_weight", "token_delta"]

Shape = tuple[int, int]


def delta_weight(
    spectrum: Tensor, entries: Tensor, shape: tuple[int, int], scaling: float
) -> Tensor:
    """delta_W (M, N) of a spectrum.

    Args:
        spectrum: (n,), any float dtype.
        entries: int64 (n, 2) on the same device; not changed in place afterwards.
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.

    Returns:
        (M, N) on the spectrum's device: float64 if the spectrum is, else float32. Its gradient
        with respect to the spectrum has the spectrum's dtype and is taken at the entries only;
        nothing but the entries is held for it.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = torch_compiled.delta_op(spectrum, entries, *shape, float(scaling))
        return compiled
    return _apply(_Delta, spectrum, entries, shape, float(scaling), None)


def merged_weight(weight: Tensor, spectrum: Tensor, entries: Tensor, scaling: float) -> Tensor:
    """W + delta_W of a frozen weight, in one pass over it; otherwise as `delta_weight`.

    Args:
        weight: (M, N), any float dtype; no gradient flows into it.
        spectrum: (n,), any float dtype.
        entries: int64 (n, 2) on the same device.
        scaling: multiplies delta_W.

    Returns:
        (M, N), float32, or float64 if weight or spectrum is.
    """
    shape = (weight.shape[0], weight.shape[1])
    if torch.compiler.is_compiling():
        compiled: Tensor = torch_compiled.delta_op(spectrum, entries, *shape, float(scaling))
        return compiled + weight.detach()
    return _apply(_Delta, spectrum, entries, shape, float(scaling), weight.detach())


def token_delta(
    x: Tensor, spectrum: Tensor, entries: Tensor, shape: tuple[int, int], scaling: float
) -> Tensor:
    """The product x delta_W^T without delta_W, in float32 (float64 if x or the spectrum is).

    Args:
        x: (..., N), any float dtype.
        spectrum: (n,), or per token: any shape (..., n) that broadcasts over x's leading ones,
            such as (batch, 1, n) for x (batch, length, N). Tokens share the entries.
        entries: int64 (n, 2) on the same device; not changed in place afterwards.
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.

    Returns:
        (..., M), of x's dtype. For its gradient in the spectrum x itself is held; for the one in
        x, nothing but the spectrum.

    Raises:
        UsageError: x's last dimension is not N.
    """
    check_features(x.shape, shape)
    if torch.compiler.is_compiling():
        compiled: Tensor = torch_compiled.token_op(x, spectrum, entries, *shape, float(scaling))
        return compiled
    return _apply(_Token, x, spectrum, entries, shape, float(scaling))


@torch.no_grad()
def merge_delta_weights(
    weights: Sequence[Tensor],
    spectra: Sequence[Tensor],
    entries: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    in_place: bool = False,
) -> list[Tensor]:
    """Add to each weight the delta_W of its spectrum; layers share shape, dtype and entries.

    Args:
        weights: L tensors of one shape, (M, N), or (N, M) when `transposed`; any float dtype.
            Sums are in float32 (float64 for float64) and rounded once.
        spectra: L tensors (n,).
        entries: int64 (n, 2), pairs (u, v) with u along M.
        scaling: multiplies every delta_W.
        transposed: the weights are stored as (N, M), as GPT-2's Conv1D does.
        in_place: write into `weights`. On the CPU the extra memory is then a few MB; elsewhere it
            is that of one delta_W.

    Returns:
        The sums: `weights` themselves, or new tensors.
    """
    targets = list(weights) if in_place else [torch.empty_like(weight) for weight in weights]
    if kernels.on_host(*weights, *spectra) and all(w.dtype != torch.float64 for w in weights):
        with np.errstate(over="ignore", invalid="ignore"):  # as torch does
            numpy_delta.rebuild(
                [kernels.host_array(weight, read_only=True) for weight in weights],
                [kernels.host_array(target) for target in targets],
                torch.stack([spectrum.float() for spectrum in spectra]).numpy(),
                entries.numpy()[:, ::-1] if transposed else entries.numpy(),
                float(scaling),
                torch.get_num_threads(),
            )
        return targets
    for weight, target, spectrum in zip(weights, targets, spectra, strict=True):
        upright = weight.T if transposed else weight
        shape = (upright.shape[0], upright.shape[1])
        spectrum = spectrum.to(torch.promote_types(spectrum.dtype, kernels.precision(weight)))
        delta = kernels.delta_weight(spectrum, entries, shape, float(scaling)).add_(upright)
        target.copy_(delta.T if transposed else delta)
    return targets


def _apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """`Function.apply`, which torch leaves untyped."""
    result: Tensor = function.apply(*arguments)
    return result


class _Delta(torch.autograd.Function):
    """spectrum -> delta_W (plus a constant weight); its adjoint is `_AtEntries`."""

    @staticmethod
    def forward(
        ctx: Any,
        spectrum: Tensor,
        entries: Tensor,
        shape: Shape,
        scaling: float,
        weight: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.scaling, ctx.dtype = shape, scaling, spectrum.dtype
        return kernels.delta_weight(spectrum, entries, shape, scaling, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (entries,) = ctx.saved_tensors
        grad = _apply(_AtEntries, grads[0], entries, ctx.shape, ctx.scaling)
        return grad.to(ctx.dtype), None, None, None, None


class _AtEntries(torch.autograd.Function):
    """G (M, N) -> Re(fft2(G)) * scaling / (M N) at the entries; its adjoint is `_Delta`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, entries: Tensor, shape: Shape, scaling: float) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.scaling = shape, scaling
        return kernels.at_entries(grad, entries, shape, scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (entries,) = ctx.saved_tensors
        return _apply(_Delta, grads[0], entries, ctx.shape, ctx.scaling, None), None, None, None


class _Token(torch.autograd.Function):
    """(x, spectrum) -> x delta_W^T."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, spectrum: Tensor, entries: Tensor, shape: Shape, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x if spectrum.requires_grad else None, spectrum, entries)
        ctx.shape, ctx.scaling = shape, scaling
        return kernels.token(x, spectrum, entries, shape, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, spectrum, entries = ctx.saved_tensors
        grad_x, grad_spectrum = kernels.token_backward(
            grads[0], x, spectrum, entries, ctx.shape, ctx.scaling, ctx.needs_input_grad[0]
        )
        return grad_x, grad_spectrum, None, None, None
