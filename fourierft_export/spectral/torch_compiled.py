"""`torch_ops` as custom operators, for `torch.compile` and `torch.export`.

Those cannot look into FFTs and numpy; an operator of the namespace `fourierft_export` stays one
node, so a model stays one graph. Schemas take sizes one by one and return only tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import torch_kernels as kernels


@torch.library.custom_op("fourierft_export::delta_weight", mutates_args=())
def delta_op(spectrum: Tensor, entries: Tensor, rows: int, columns: int, scaling: float) -> Tensor:
    """`torch_ops.delta_weight`."""
    return kernels.delta_weight(spectrum, entries, (rows, columns), scaling)


@delta_op.register_fake
def _(spectrum: Tensor, entries: Tensor, rows: int, columns: int, scaling: float) -> Tensor:  # noqa: ARG001
    return spectrum.new_empty(rows, columns, dtype=kernels.precision(spectrum))


@torch.library.custom_op("fourierft_export::at_entries", mutates_args=())
def _at_entries_op(
    grad: Tensor, entries: Tensor, rows: int, columns: int, scaling: float
) -> Tensor:
    return kernels.at_entries(grad, entries, (rows, columns), scaling)


@_at_entries_op.register_fake
def _(grad: Tensor, entries: Tensor, rows: int, columns: int, scaling: float) -> Tensor:  # noqa: ARG001
    return grad.new_empty(entries.shape[0], dtype=kernels.precision(grad))


@torch.library.custom_op("fourierft_export::token_delta", mutates_args=())
def token_op(
    x: Tensor, spectrum: Tensor, entries: Tensor, rows: int, columns: int, scaling: float
) -> Tensor:
    """`torch_ops.token_delta`."""
    return kernels.token(x, spectrum, entries, (rows, columns), scaling)


@token_op.register_fake
def _(
    x: Tensor,
    spectrum: Tensor,  # noqa: ARG001
    entries: Tensor,  # noqa: ARG001
    rows: int,
    columns: int,  # noqa: ARG001
    scaling: float,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("fourierft_export::token_backward", mutates_args=())
def _token_backward_op(
    grad: Tensor,
    x: Tensor | None,
    spectrum: Tensor,
    entries: Tensor,
    rows: int,
    columns: int,
    scaling: float,
    wants_x: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_spectrum = kernels.token_backward(
        grad, x, spectrum, entries, (rows, columns), scaling, wants_x
    )
    return (
        grad.new_empty(0) if grad_x is None else grad_x,
        spectrum.new_empty(0) if grad_spectrum is None else grad_spectrum,
    )


@_token_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor | None,
    spectrum: Tensor,
    entries: Tensor,  # noqa: ARG001
    rows: int,  # noqa: ARG001
    columns: int,
    scaling: float,  # noqa: ARG001
    wants_x: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = grad.new_empty(*grad.shape[:-1], columns) if wants_x else grad.new_empty(0)
    return grad_x, spectrum.new_empty(spectrum.shape if x is not None else (0,))


def _delta_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    spectrum, entries, *ctx.sizes = inputs
    ctx.dtype = spectrum.dtype
    ctx.save_for_backward(entries)


def _delta_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (entries,) = ctx.saved_tensors
    return _at_entries_op(grad, entries, *ctx.sizes).to(ctx.dtype), None, None, None, None


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, spectrum, entries, *ctx.sizes = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, spectrum, entries)


def _token_grads(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    x, spectrum, entries = ctx.saved_tensors
    wants_x = bool(ctx.needs_input_grad[0])
    grad_x, grad_spectrum = _token_backward_op(grad, x, spectrum, entries, *ctx.sizes, wants_x)
    return (
        grad_x if wants_x else None,
        None if x is None else grad_spectrum,
        None,
        None,
        None,
        None,
    )


delta_op.register_autograd(_delta_backward, setup_context=_delta_setup)
token_op.register_autograd(_token_grads, setup_context=_token_setup)
