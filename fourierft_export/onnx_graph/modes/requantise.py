"""Merging into quantised weights: W + delta_W quantised again, and what that costs the adapter.

A step of the quantisation is often larger than the adapter's change, so this loses much of it; it
is done only when asked for, and the loss is measured. Zero points stay; a scale grows where the
sum would not fit otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BaseMismatchError
from ...spectral.delta import Term, add_delta_weight
from ...types import Array
from ..graph.edits import Edits
from ..graph.source import constant_of
from ..locate.quantised import QuantisedLinear
from ..locate.quantised_forms import unpacked

if TYPE_CHECKING:
    import onnx_ir as ir


def merge_quantised(
    edits: Edits, linear: QuantisedLinear, changes: Mapping[str, tuple[slice, Sequence[Term]]]
) -> dict[str, float]:
    """Replace a quantised weight by W + delta_W, quantised in the same form.

    Args:
        edits: of the graph, which is changed in place.
        linear: the node.
        changes: layer -> its outputs (of several, if they are packed) and the adapters' changes.

    Returns:
        Layer -> its loss: the norm of what the new weight lacks of W + delta_W, relative to that of
        delta_W (Frobenius; W is the dequantised base weight). 1 is as bad as no adapter.

    Raises:
        BaseMismatchError: a form that cannot be taken apart.
    """
    blocked = linear.kind == "QDQ" and linear.block_size > 0
    if linear.dequantised is None or linear.scale is None or blocked:
        raise BaseMismatchError(
            f"weight {linear.weight}",
            expected="a plain MatMulNBits, QDQ or dynamic int8 weight",
            found=f"{linear.kind} with a scale per block"
            if blocked
            else f"another form of {linear.kind}",
            remedy="use --mode unmerged, swappable or bank",
        )
    before, _ = linear.dequantised()
    before = np.ascontiguousarray(before)
    wanted = before.copy()
    for rows, terms in changes.values():
        wanted[rows] = add_delta_weight(before[rows], list(terms))
    node, index = linear.integers
    value, tensor = _constant(linear.integers)
    scale_value, scale_tensor = _constant(linear.scale)
    old = edits.source.read(tensor)
    scale = edits.source.read(scale_tensor)
    zero = None if linear.zero is None else edits.source.read(_constant(linear.zero)[1])
    if linear.kind == "MatMulNBits":
        integers, scales, after = _blocks(linear, wanted, scale, zero)
    else:
        integers, scales, after = _channels(linear, wanted, old.dtype, scale, zero)
    new = integers.reshape(old.shape)
    edits.put(edits.own(value, [(node, index)]), lambda: new)
    edits.put(edits.own(scale_value, [linear.scale]), lambda: scales)
    return {
        layer: _norm(after[rows] - wanted[rows]) / max(_norm(wanted[rows] - before[rows]), 1e-30)
        for layer, (rows, _) in changes.items()
    }


def _norm(difference: Array) -> float:
    return float(np.linalg.norm(difference.astype(np.float64)))


def _constant(place: tuple[ir.Node, int]) -> tuple[ir.Value, ir.TensorProtocol]:
    value = place[0].inputs[place[1]]
    tensor = constant_of(value) if value is not None else None
    if value is None or tensor is None:
        raise ValueError(f"input {place[1]} of {place[0].name} is no constant")
    return value, tensor


def _channels(
    linear: QuantisedLinear,
    wanted: Array,
    dtype: np.dtype[Any],
    scale: Array,
    zero: Array | None,
) -> tuple[Array, Array, Array]:
    """(integers in the graph's layout, scales, dequantised (out, in)) of one scale per channel."""
    weight = wanted.T if linear.in_out else wanted
    limits = np.iinfo(np.dtype(dtype))
    along = [1, 1]
    if scale.size > 1:
        along[linear.axis] = -1
    grid = np.abs(scale.astype(np.float32)).reshape(along)
    offset = np.zeros(along, np.float32) if zero is None else zero.astype(np.float32).reshape(along)
    others = tuple(a for a in (0, 1) if along[a] == 1)
    grid = _grown(weight, grid, limits.min - offset, limits.max - offset, others)
    grid = grid.astype(scale.dtype).astype(np.float32)
    integers = np.clip(np.rint(weight / grid) + offset, limits.min, limits.max)
    after = (integers - offset) * grid
    return (
        integers.astype(dtype),
        grid.astype(scale.dtype).reshape(scale.shape),
        after.T if linear.in_out else after,
    )


def _blocks(
    linear: QuantisedLinear, wanted: Array, scale: Array, zero: Array | None
) -> tuple[Array, Array, Array]:
    """(packed integers, scales, dequantised (out, in)) of MatMulNBits."""
    (rows, columns), size, bits = linear.shape, linear.block_size, linear.bits
    blocks = -(-columns // size)
    padded = np.zeros((rows, blocks * size), np.float32)
    padded[:, :columns] = wanted
    weight: Array = padded.reshape(rows, blocks, size)
    if zero is None:
        offset = np.full((rows, blocks, 1), 2 ** (bits - 1), np.float32)
    elif zero.dtype == np.uint8:
        offset = unpacked(zero, bits).reshape(rows, -1)[:, :blocks, None].astype(np.float32)
    else:
        offset = zero.astype(np.float32).reshape(rows, blocks, 1)
    highest = 2**bits - 1
    signed = scale.astype(np.float32).reshape(rows, blocks, 1)
    # A scale may be negative here: then the integers count downwards.
    weight = weight * np.where(signed < 0, -1, 1)
    grid = _grown(weight, np.abs(signed), -offset, highest - offset, (2,))
    grid = grid.astype(scale.dtype).astype(np.float32)
    integers = np.clip(np.rint(weight / grid) + offset, 0, highest)
    sign = np.where(signed < 0, -1, 1)
    after = ((integers - offset) * grid * sign).reshape(rows, -1)[:, :columns]
    flat = integers.astype(np.uint8).reshape(rows, -1)
    packed = flat if bits == 8 else flat[:, ::2] | flat[:, 1::2] << 4
    return packed, (grid * sign).astype(scale.dtype).reshape(scale.shape), after


def _grown(weight: Array, grid: Array, low: Array, high: Array, axes: tuple[int, ...]) -> Array:
    """The steps, larger where the weights would not fit between the limits otherwise."""
    top = np.max(weight, axis=axes, keepdims=True) / np.maximum(high, 1)
    bottom = np.min(weight, axis=axes, keepdims=True) / np.minimum(low, -1)
    needed = np.maximum(np.maximum(top, bottom), grid)
    return np.asarray(np.where(needed > 0, needed, 1.0), dtype=np.float32)
