"""The spectral forms for torch tensors, on any device, differentiable in the spectrum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def delta_weight(
    spectrum: Tensor, entries: Tensor, shape: tuple[int, int], scaling: float
) -> Tensor:
    """delta_W (M, N) of a spectrum, by the half-spectrum form (see `half_spectrum`).

    Args:
        spectrum: (n,), any float dtype.
        entries: int64 (n, 2) on the same device.
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.

    Returns:
        (M, N) on the spectrum's device: float64 if the spectrum is, else float32. Its gradient
        with respect to the spectrum has the spectrum's dtype and is taken at the entries only.
    """
    return _apply(_Delta, spectrum, entries, shape, float(scaling))


def _apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """`Function.apply`, which torch leaves untyped."""
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Delta(torch.autograd.Function):
    """spectrum -> delta_W; its adjoint is `_AtEntries`."""

    @staticmethod
    def forward(
        ctx: Any, spectrum: Tensor, entries: Tensor, shape: tuple[int, int], scaling: float
    ) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.scaling, ctx.dtype = shape, scaling, spectrum.dtype
        return _expand(spectrum, entries, shape, scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (entries,) = ctx.saved_tensors
        grad = _apply(_AtEntries, grads[0], entries, ctx.shape, ctx.scaling)
        return grad.to(ctx.dtype), None, None, None


class _AtEntries(torch.autograd.Function):
    """G (M, N) -> Re(fft2(G)) * scaling / (M N) at the entries; its adjoint is `_Delta`."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, entries: Tensor, shape: tuple[int, int], scaling: float
    ) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.scaling = shape, scaling
        u, v = _fold(entries, shape)
        # Only the columns that occur are transformed downwards.
        columns, which = torch.unique(v, return_inverse=True)
        half = torch.fft.rfft(grad, dim=1)[:, columns]
        picked: Tensor = torch.fft.fft(half, dim=0)[u, which].real
        return picked * (scaling / (shape[0] * shape[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (entries,) = ctx.saved_tensors
        return _apply(_Delta, grads[0], entries, ctx.shape, ctx.scaling), None, None, None


def _fold(entries: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The u and v, each folded to the one of its two mirror images with v <= N // 2."""
    rows, columns = shape
    u, v = entries.unbind(1)
    mirrored = 2 * v > columns
    return torch.where(mirrored, -u % rows, u), torch.where(mirrored, columns - v, v)


def _expand(spectrum: Tensor, entries: Tensor, shape: tuple[int, int], scaling: float) -> Tensor:
    rows, columns = shape
    u, v = _fold(entries, shape)
    dtype = torch.float64 if spectrum.dtype == torch.float64 else torch.float32
    weight = 1.0 + ((v == 0) | (2 * v == columns)).to(dtype)
    half = torch.zeros(rows, columns // 2 + 1, dtype=dtype, device=spectrum.device)
    half.index_put_((u, v), spectrum.to(dtype) * (scaling / (2 * rows)) * weight, accumulate=True)
    spectral = torch.fft.ifft(half, dim=0, norm="forward")
    # Backends differ on what an imaginary part in the self-mirrored columns means.
    ends = [0] if columns % 2 else [0, columns // 2]
    spectral[:, ends] = spectral[:, ends].real.to(spectral.dtype)
    delta: Tensor = torch.fft.irfft(spectral, columns, dim=1)
    return delta
