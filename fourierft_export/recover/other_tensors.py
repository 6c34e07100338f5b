"""Compares the tensors of a base and a merged checkpoint that get no delta_W: heads, biases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from ..errors import BaseMismatchError
from ..files.container import TensorInfo
from ..files.dtypes import FLOAT_DTYPES, to_numpy
from ..models.base import Base
from ..models.task import head_labels
from ..types import Array

_HEADS = ("classifier", "classification_head", "score", "pooler", "pre_classifier")


def compare_other_tensors(
    before: Base,
    after: Base,
    modules: Sequence[str],
    layers: Collection[str],
    wanted: Sequence[str] | None,
    count: Callable[[int], None],
) -> tuple[dict[str, Array], list[str]]:
    """Find every tensor that differs from the base's, but for the adapted weights.

    Args:
        before: the base.
        after: the merged checkpoint.
        modules: the adapter's module paths.
        layers: the adapted weights, by their names in `after`.
        wanted: the adapter's names of its dense tensors; None to take heads, biases and tensors
            that the base does not have.
        count: called with the bytes of the base's tensors that were compared.

    Returns:
        The dense tensors of the adapter, and the names of all others that changed.
    """
    bridge = after.bridge(modules)
    expected = {bridge.to_base(name): name for name in wanted or ()}
    weights = [name.removesuffix(".weight") for name in before.tensors if name.endswith(".weight")]
    to_after = after.bridge(weights)
    compared = set(layers)
    saved: list[str] = []
    changed: list[str] = []
    for name, info in before.tensors.items():
        there = name if name in after.tensors else to_after.to_base(name)
        if there in layers:
            continue
        compared.add(there)
        if there not in after.tensors:
            if info.dtype in FLOAT_DTYPES:  # position numbers and the like are often left out
                changed.append(f"{name} (absent)")
        elif there in expected:
            saved.append(there)
        elif not _is_same(before, info, after, after.tensors[there]):
            is_saved = wanted is None and _may_be_saved(there, info)
            (saved if is_saved else changed).append(there)
        count(info.nbytes)
    for there in sorted(after.tensors.keys() - compared):
        if there in expected:
            saved.append(there)
        elif not _is_kept_output(before, after, there):
            (saved if wanted is None else changed).append(there)
    return {expected.get(name, name): after.checkpoint.read(name) for name in saved}, changed


def _may_be_saved(name: str, info: TensorInfo) -> bool:
    """Return whether a tensor is what PEFT saves with the spectra: a bias, or a head."""
    is_bias = len(info.shape) == 1 and name.endswith(".bias")
    head = head_labels({name: info.shape}) is not None
    return is_bias or head or any(part in _HEADS for part in name.split("."))


def _is_kept_output(before: Base, after: Base, name: str) -> bool:
    """Return whether a tensor is an output embedding that was tied in the base."""
    if not f".{name}".endswith(".lm_head.weight"):
        return False
    try:
        own = before.layer(name.removesuffix(".weight")).tensor
    except BaseMismatchError:
        return False
    return _is_same(before, before.tensors[own], after, after.tensors[name])


def _is_same(before: Base, mine: TensorInfo, after: Base, its: TensorInfo) -> bool:
    """Return whether two tensors are equal, after rounding to the merged one's dtype."""
    if mine.shape != its.shape:
        return False
    if mine.dtype == its.dtype:
        blocks = before.checkpoint.read_blocks(mine.name), after.checkpoint.read_blocks(its.name)
        return all(a == b for a, b in zip(*blocks, strict=True))
    if not {mine.dtype, its.dtype} <= {*FLOAT_DTYPES}:
        return False
    with np.errstate(over="ignore"):
        rounded = before.checkpoint.read(mine.name).astype(to_numpy(its.dtype))
    return rounded.tobytes() == after.checkpoint.read(its.name).tobytes()
