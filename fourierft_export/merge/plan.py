"""The output of a merge, shard by shard, before any of it is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..files.checkpoint import Checkpoint
from ..files.container import Header, TensorInfo
from ..files.dtypes import FLOAT_DTYPES
from ..files.write import Slot, in_file_order
from ..models.base import Base
from .changes import Changes, TensorPlan

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class ShardPlan:
    """One weight file of the output; all that a worker needs to write it.

    Attributes:
        name: its file name, that of the base's shard.
        source: the header of the base's shard.
        checkpoint: the base.
        tensors: in the order they are written; empty when the file is copied byte for byte.
        nbytes: size of the payloads.
    """

    name: str
    source: Header
    checkpoint: Checkpoint
    tensors: tuple[TensorPlan, ...]
    nbytes: int


def plan_shards(base: Base, changes: Changes, dtype: str) -> tuple[ShardPlan, ...]:
    """The shards of the output: the base's, in its order, new tensors in the last one."""
    checkpoint = base.checkpoint
    wanted = DTYPES.get(dtype)
    # transformers takes the dtype of a model without one in its config from its first tensor, so
    # a float32 head must not come first in a bfloat16 checkpoint.
    common = wanted or _most_common_float(checkpoint.tensors.values())
    shards = []
    for number, shard in enumerate(checkpoint.headers):
        tensors = []
        for info in shard.tensors.values():
            plan = changes.tensors.get(info.name)
            plan = plan or TensorPlan(Slot(info.name, info.dtype, info.shape), info)
            kept = info.dtype if info.dtype in FLOAT_DTYPES else common
            tensors.append(_named(plan, changes, wanted or kept))
        if number == len(checkpoint.headers) - 1:
            added = sorted(changes.tensors.keys() - checkpoint.tensors.keys())
            tensors += [_named(changes.tensors[key], changes, common) for key in added]
        order = {slot.name: n for n, slot in enumerate(in_file_order(t.slot for t in tensors))}
        tensors.sort(key=lambda plan: order[plan.slot.name])
        nbytes = sum(plan.slot.nbytes for plan in tensors)
        written = () if all(plan.is_copied for plan in tensors) else tuple(tensors)
        shards.append(ShardPlan(shard.path.name, shard, checkpoint, written, nbytes))
    return tuple(shards)


def index_text(checkpoint: Checkpoint, shards: Sequence[ShardPlan]) -> str:
    """The shard index of the output, written as transformers writes it."""
    where: dict[str, str] = {}
    elements = 0
    for shard in shards:
        slots = [plan.slot for plan in shard.tensors] or [
            Slot(info.name, info.dtype, info.shape) for info in shard.source.tensors.values()
        ]
        where.update((slot.name, shard.name) for slot in slots)
        elements += sum(prod(slot.shape) for slot in slots)
    metadata = dict(checkpoint.index_metadata)
    metadata["total_size"] = sum(shard.nbytes for shard in shards)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = elements
    return json.dumps({"metadata": metadata, "weight_map": where}, indent=2, sort_keys=True) + "\n"


def _named(plan: TensorPlan, changes: Changes, dtype: str) -> TensorPlan:
    """`plan` under its name in the output, and in `dtype` if it is a float tensor."""
    name, kind, shape = plan.slot
    slot = Slot(changes.out_name(name), dtype if kind in FLOAT_DTYPES else kind, shape)
    return replace(plan, slot=slot)


def _most_common_float(tensors: Iterable[TensorInfo]) -> str:
    """The float dtype that most bytes have."""
    sizes: Counter[str] = Counter()
    for info in tensors:
        if info.dtype in FLOAT_DTYPES:
            sizes[info.dtype] += info.nbytes
    return max(sizes, key=lambda name: (sizes[name], name), default="F32")


def replaced_and_added(base: Base, changes: Changes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The output's names of tensors that are replaced whole, and of those that the base lacks."""
    replaced = [k for k, plan in changes.tensors.items() if plan.value is not None]
    return (
        tuple(changes.out_name(key) for key in sorted(replaced) if key in base.tensors),
        tuple(
            changes.out_name(key) for key in sorted(changes.tensors.keys() - base.tensors.keys())
        ),
    )


def changed_tensors(shards: Iterable[ShardPlan]) -> Mapping[str, TensorPlan]:
    """The tensors that get delta_W, by their names in the output."""
    return {plan.slot.name: plan for shard in shards for plan in shard.tensors if plan.shares}
