"""delta_W and the token form for torch tensors, on any device, differentiable to any order.

Eagerly these are autograd functions; under `torch.compile` and `torch.export`, which cannot look
into FFTs and numpy, the same kernels are custom operators of the namespace `fourierft_export`, so
that a model stays one graph. Eagerly the operators would cost 30 us more a call.

Both forms are linear in each of their arguments, so their derivatives are made of the same few
operations. With T(x, c) = x delta_W(c)^T, T' that of the transposed delta_W, and
B(g, x)_k = dL/dc_k for the gradient g of the output: dT/dx = T'(g, c), dT/dc = B(g, x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UsageError
from . import delta as numpy_delta
from . import torch_kernels as kernels

Function = type[torch.autograd.Function]


def delta_weight(
    spectrum: Tensor,
    entries: Tensor,
    shape: tuple[int, int],
    scaling: float,
    weight: Tensor | None = None,
) -> Tensor:
    """delta_W (M, N) of a spectrum, or a frozen weight plus delta_W, in one pass over it.

    It is float64 if the spectrum or the weight is, else float32. The gradient in the spectrum has
    its dtype and is taken at the entries only; nothing but the entries is held for it.

    Args:
        spectrum: (n,), any float dtype.
        entries: int64 (n, 2) on the same device; not changed in place afterwards.
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.
        weight: (M, N), any float dtype; no gradient flows into it.
    """
    fixed = None if weight is None else weight.detach()
    arguments = (spectrum, entries, *shape, float(scaling), fixed)
    result: Tensor
    if torch.compiler.is_compiling():
        result = _delta_op(*arguments)
    elif _is_differentiated(spectrum):
        result = _apply(_Delta, *arguments)
    else:
        result = kernels.delta_weight(*arguments)
    return result


def token_delta(
    x: Tensor, spectrum: Tensor, entries: Tensor, shape: tuple[int, int], scaling: float
) -> Tensor:
    """The product x delta_W^T (..., M) without delta_W, in x's dtype.

    It is computed in float32 (float64 if x or the spectrum is). For the gradient in the spectrum x
    itself is held; for the one in x, nothing but the spectrum.

    Args:
        x: (..., N), any float dtype.
        spectrum: (n,), or per token: any shape (..., n) that broadcasts over x's leading ones,
            such as (batch, 1, n) for x (batch, length, N). Tokens share the entries.
        entries: int64 (n, 2) on the same device; not changed in place afterwards.
        shape: (M, N) = (out_features, in_features).
        scaling: multiplies delta_W.
    """
    if not x.ndim or x.shape[-1] != shape[1]:
        raise UsageError(
            "input of an adapted layer",
            expected=f"a last dimension of {shape[1]}",
            found=f"shape {tuple(x.shape)}",
        )
    arguments = (x, spectrum, entries, *shape, float(scaling))
    result: Tensor
    if torch.compiler.is_compiling():
        result = _token_op(*arguments)
    elif _is_differentiated(x, spectrum):
        result = _apply(_Token, *arguments)
    else:
        result = kernels.token(*arguments)
    return result


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
    """
    targets = list(weights) if in_place else [torch.empty_like(weight) for weight in weights]
    if kernels.on_host(*weights, *spectra) and all(w.dtype != torch.float64 for w in weights):
        with np.errstate(over="ignore", invalid="ignore"):  # as torch does
            numpy_delta.rebuild(
                (weights[0].shape[0], weights[0].shape[1]),
                torch.stack([spectrum.float() for spectrum in spectra]).numpy(),
                entries.numpy()[:, ::-1] if transposed else entries.numpy(),
                float(scaling),
                numpy_delta.adder(
                    [kernels.host_array(weight, read_only=True) for weight in weights],
                    [kernels.host_array(target) for target in targets],
                ),
                torch.get_num_threads(),
            )
        return targets
    for weight, target, spectrum in zip(weights, targets, spectra, strict=True):
        upright = weight.T if transposed else weight
        spectrum = spectrum.to(torch.promote_types(spectrum.dtype, kernels.precision(weight)))
        rows, columns = upright.shape
        delta = kernels.delta_weight(spectrum, entries, rows, columns, float(scaling)).add_(upright)
        target.copy_(delta.T if transposed else delta)
    return targets


def _is_differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative may be wanted; without one, an autograd function costs 0.1 ms."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _apply(function: Function, *arguments: object) -> Any:
    """`Function.apply`, which torch leaves untyped."""
    return function.apply(*arguments)


def _one_by_one(function: Function) -> Callable[..., tuple[Any, Any]]:
    """The rule of torch.func.vmap: apply the function to each sample, and stack the results."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        results = []
        for i in range(info.batch_size):
            own = (
                arg if dim is None else arg.select(dim, i)
                for arg, dim in zip(args, in_dims, strict=True)
            )
            results.append(_apply(function, *own))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return vmap


def _save_delta(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    values, entries, *ctx.sizes = inputs[:5]
    ctx.dtype = values.dtype
    ctx.save_for_backward(entries)


class _Delta(torch.autograd.Function):
    """spectrum -> delta_W (plus a constant weight)."""

    forward = staticmethod(kernels.delta_weight)
    setup_context = staticmethod(_save_delta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (entries,) = ctx.saved_tensors
        grad = _apply(_AtEntries, grads[0], entries, *ctx.sizes)
        return grad.to(ctx.dtype), None, None, None, None, None


class _AtEntries(torch.autograd.Function):
    """The adjoint of `_Delta`: G (M, N) -> its inner product with each entry's cosine."""

    forward = staticmethod(kernels.at_entries)
    setup_context = staticmethod(_save_delta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (entries,) = ctx.saved_tensors
        delta = _apply(_Delta, grads[0], entries, *ctx.sizes, None)
        return delta.to(ctx.dtype), None, None, None, None


def _save_token(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    x, spectrum, entries, *ctx.sizes = inputs
    ctx.save_for_backward(x if spectrum.requires_grad else None, spectrum, entries)


def _token_backward(gradients: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """The backward pass of the token form, by an autograd function or an operator."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, spectrum, entries = ctx.saved_tensors
        wants_x = bool(ctx.needs_input_grad[0])
        grad_x, grad_spectrum = gradients(grad, x, spectrum, entries, *ctx.sizes, wants_x)
        return grad_x if wants_x else None, None if x is None else grad_spectrum, *(None,) * 4

    return backward


class _TokenGradients(torch.autograd.Function):
    """(g, x, spectrum) -> T'(g, spectrum), B(g, x); empty tensors where they are not wanted."""

    forward = staticmethod(kernels.token_gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        grad, x, spectrum, entries, *ctx.sizes, ctx.wants_x = inputs
        ctx.save_for_backward(grad, x, spectrum, entries)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad, x, spectrum, entries = ctx.saved_tensors
        along_x, along_spectrum = grads
        grad_grad = grad_x = grad_spectrum = None
        if ctx.wants_x:
            grad_grad = _apply(_Token, along_x, spectrum, entries, *ctx.sizes)
        if x is not None:
            own = _apply(_Token, x.to(grad.dtype), along_spectrum, entries, *ctx.sizes)
            grad_grad = own if grad_grad is None else grad_grad + own
        if ctx.wants_x or x is not None:
            # One call gives both T'(g, along_spectrum) and B(g, along_x).
            grad_x, grad_spectrum = _apply(
                _TokenGradients,
                *(grad, along_x if ctx.wants_x else None),
                *(spectrum if x is None else along_spectrum, entries, *ctx.sizes, x is not None),
            )
        return (
            grad_grad,
            None if x is None else grad_x.to(x.dtype),  # type: ignore[union-attr]
            grad_spectrum if ctx.wants_x else None,
            *(None,) * 5,
        )


class _Token(torch.autograd.Function):
    """T: (x, spectrum) -> x delta_W^T."""

    forward = staticmethod(kernels.token)
    setup_context = staticmethod(_save_token)
    backward = staticmethod(_token_backward(_TokenGradients.apply))


for _function in (_Delta, _AtEntries, _Token, _TokenGradients):
    _function.vmap = staticmethod(_one_by_one(_function))  # type: ignore[method-assign]


def _operator(name: str, kernel: Callable[..., Any]) -> Any:
    """A custom operator; its fake version runs the kernel on tensors without values."""
    operator = torch.library.custom_op(f"fourierft_export::{name}", kernel, mutates_args=())
    operator.register_fake(kernel)
    return operator


_delta_op = _operator("delta_weight", kernels.delta_weight)
_at_entries_op = _operator("at_entries", kernels.at_entries)
_token_op = _operator("token_delta", kernels.token)
_token_gradients_op = _operator("token_gradients", kernels.token_gradients)


def _delta_op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (entries,) = ctx.saved_tensors
    return _at_entries_op(grad, entries, *ctx.sizes).to(ctx.dtype), *(None,) * 5


_delta_op.register_autograd(_delta_op_backward, setup_context=_save_delta)
_token_op.register_autograd(_token_backward(_token_gradients_op), setup_context=_save_token)
