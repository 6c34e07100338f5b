"""What else changed between a base and a merged checkpoint: heads, biases, or what should not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from ..errors import BaseMismatchError
from ..files.container import FLOAT_DTYPES, TensorInfo
from ..files.dtypes import to_numpy
from ..models.base import Base
from ..models.task import head_labels
from ..types import Array

_HEADS = ("classifier", "classification_head", "score", "pooler", "pre_classifier")


def other_changes(
    before: Base,
    after: Base,
    modules: Sequence[str],
    layers: Collection[str],
    wanted: Sequence[str] | None,
    count: Callable[[int], None],
) -> tuple[dict[str, Array], list[str]]:
    """Every tensor that is not as in the base, the adapted weights apart.

    Args:
        before: the base.
        after: the merged checkpoint.
        modules: module paths in the adapter's language.
        layers: names of the adapted weights in `after`.
        wanted: names, in the adapter's language, of the dense tensors it carries; None to take
            heads, biases and tensors that the base does not have.
        count: told of the base's bytes that were compared.

    Returns:
        The dense tensors of the adapter, and the names of those that changed otherwise.
    """
    bridge = after.bridge(modules)
    expected = {} if wanted is None else {bridge.to_base(name): name for name in wanted}
    names = [name.removesuffix(".weight") for name in before.tensors if name.endswith(".weight")]
    to_after = after.bridge(names)
    compared: set[str] = set()
    saved: dict[str, Array] = {}
    changed: list[str] = []
    for name, info in before.tensors.items():
        there = name if name in after.tensors else to_after.to_base(name)
        compared.add(there)
        if there in layers:
            continue
        if there not in after.tensors:
            if info.dtype in FLOAT_DTYPES:  # position numbers and the like are often left out
                changed.append(f"{name} (absent)")
        elif there in expected:
            saved[expected[there]] = after.checkpoint.read(there)
        elif not _same(before, info, after, after.tensors[there]):
            if wanted is None and _may_be_saved(there, info):
                saved[there] = after.checkpoint.read(there)
            else:
                changed.append(there)
        count(info.nbytes)
    for there in sorted(after.tensors.keys() - compared - set(layers)):
        if there in expected:
            saved[expected[there]] = after.checkpoint.read(there)
        elif wanted is None and not _is_kept_output(before, after, there):
            saved[there] = after.checkpoint.read(there)
        elif wanted is not None and not _is_kept_output(before, after, there):
            changed.append(there)
    return saved, changed


def _may_be_saved(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is what PEFT saves beside spectra: a bias, or a head."""
    is_bias = len(info.shape) == 1 and name.endswith(".bias")
    head = head_labels({name: info.shape}) is not None
    return is_bias or head or any(part in _HEADS for part in name.split("."))


def _is_kept_output(before: Base, after: Base, name: str) -> bool:
    """Whether a tensor is an output embedding that was tied to the base's input embedding."""
    if not f".{name}".endswith(".lm_head.weight"):
        return False
    try:
        own = before.layer(name.removesuffix(".weight")).tensor
    except BaseMismatchError:
        return False
    return _same(before, before.tensors[own], after, after.tensors[name])


def _same(before: Base, mine: TensorInfo, after: Base, its: TensorInfo) -> bool:
    """Whether two tensors are equal, after rounding to the merged one's dtype."""
    if mine.shape != its.shape:
        return False
    if mine.dtype != its.dtype and not {mine.dtype, its.dtype} <= {*FLOAT_DTYPES}:
        return False
    if mine.dtype == its.dtype:
        pieces = zip(
            before.checkpoint.blocks(mine.name), after.checkpoint.blocks(its.name), strict=True
        )
        return all(a == b for a, b in pieces)
    with np.errstate(over="ignore"):
        rounded = before.checkpoint.read(mine.name).astype(to_numpy(its.dtype))
    return rounded.tobytes() == after.checkpoint.read(its.name).tobytes()
