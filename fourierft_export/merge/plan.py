"""The output of a merge, tensor by tensor and shard by shard, before any of it is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..files.checkpoint import Checkpoint, Shard
from ..files.container import FLOAT_DTYPES, TensorInfo
from ..files.dtypes import to_name
from ..files.write import Slot, in_file_order
from ..types import Array
from .changes import Changes, LayerChange

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the output; exactly one of the three sources is used.

    Attributes:
        slot: name, dtype and shape in the output.
        source: the base's tensor, copied (and converted where the dtype differs).
        change: the base's tensor plus delta_W.
        value: a dense tensor of a bundle.
        converts: the changed tensor has another dtype in the base.
    """

    slot: Slot
    source: TensorInfo | None = None
    change: LayerChange | None = None
    value: Array | None = None
    converts: bool = False


@dataclass(frozen=True)
class OutShard:
    """One weight file of the output.

    Attributes:
        name: its file name, that of the base's shard.
        source: the base's shard.
        tensors: in the order they are written; empty when the file is copied byte for byte.
        nbytes: size of the payloads.
    """

    name: str
    source: Shard
    tensors: tuple[OutTensor, ...]
    nbytes: int


def lay_out(checkpoint: Checkpoint, changes: Changes, dtype: str) -> tuple[OutShard, ...]:
    """The shards of the output: the base's, in its order, new tensors in the last one.

    Args:
        checkpoint: the base.
        changes: what bundles change.
        dtype: "keep", "float32", "float16" or "bfloat16".
    """
    common = DTYPES.get(dtype) or common_float(checkpoint)
    shards = []
    for number, shard in enumerate(checkpoint.parts):
        tensors = [_existing(info, changes, dtype) for info in shard.tensors]
        if number == len(checkpoint.parts) - 1:
            tensors += _added(checkpoint, changes, common)
        untouched = all(
            t.source is not None and t.slot == (t.source.name, t.source.dtype, t.source.shape)
            for t in tensors
        )
        order = {slot.name: n for n, slot in enumerate(in_file_order(t.slot for t in tensors))}
        tensors.sort(key=lambda t: order[t.slot.name])
        nbytes = sum(t.slot.nbytes for t in tensors)
        written = () if untouched else tuple(tensors)
        shards.append(OutShard(shard.path.name, shard, written, nbytes))
    return tuple(shards)


def common_float(checkpoint: Checkpoint) -> str:
    """The float dtype that most bytes of a checkpoint have; new tensors get it too.

    transformers takes the dtype of a model without one in its config from its first tensor, so a
    float32 head must not come first in a bfloat16 checkpoint.
    """
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in FLOAT_DTYPES:
            sizes[info.dtype] += info.nbytes
    return max(sizes, key=lambda name: (sizes[name], name), default="F32")


def out_name(key: str, changes: Changes) -> str:
    """The output's name of a tensor, from the base's."""
    prefixed = changes.prefix and key not in changes.outside
    return f"{changes.prefix}.{key}" if prefixed else key


def _existing(info: TensorInfo, changes: Changes, dtype: str) -> OutTensor:
    is_float = info.dtype in FLOAT_DTYPES
    kind = DTYPES.get(dtype, info.dtype) if is_float else info.dtype
    name = out_name(info.name, changes)
    if info.name in changes.dense:
        return _dense(name, changes.dense[info.name], kind)
    slot = Slot(name, kind, info.shape)
    if info.name in changes.layers:
        return OutTensor(slot, change=changes.layers[info.name], converts=kind != info.dtype)
    return OutTensor(slot, source=info)


def _added(checkpoint: Checkpoint, changes: Changes, common: str) -> list[OutTensor]:
    """Tensors that the base does not have, in the order of their names."""
    added = []
    for key in sorted({*changes.layers, *changes.dense, *changes.aliases} - {*checkpoint.tensors}):
        name = out_name(key, changes)
        if key in changes.dense:
            added.append(_dense(name, changes.dense[key], common))
            continue
        change = changes.layers.get(key)
        source = checkpoint.tensors[change.source if change else changes.aliases[key]]
        slot = Slot(name, common, source.shape)
        converts = source.dtype != common
        added.append(OutTensor(slot, None if change else source, change, converts=converts))
    return added


def _dense(name: str, value: Array, dtype: str) -> OutTensor:
    kind = to_name(value.dtype)
    slot = Slot(name, dtype if kind in FLOAT_DTYPES else kind, value.shape)
    return OutTensor(slot, value=value)


def index_text(checkpoint: Checkpoint, shards: tuple[OutShard, ...]) -> str:
    """The shard index of the output, written as transformers writes it."""
    where: dict[str, str] = {}
    elements = 0
    for shard in shards:
        slots = [t.slot for t in shard.tensors] or [
            Slot(info.name, info.dtype, info.shape) for info in shard.source.tensors
        ]
        where.update((slot.name, shard.name) for slot in slots)
        elements += sum(prod(slot.shape) for slot in slots)
    metadata: Mapping[str, Any] = dict(checkpoint.index_metadata) | {
        "total_size": sum(shard.nbytes for shard in shards)
    }
    if "total_parameters" in metadata:
        metadata = dict(metadata) | {"total_parameters": elements}
    return json.dumps({"metadata": metadata, "weight_map": where}, indent=2, sort_keys=True) + "\n"
