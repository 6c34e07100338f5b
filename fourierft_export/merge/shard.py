"""Writes one weight file of the output; a merge is these, in any order, in any process."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle.fingerprint import fingerprint, judge
from ..bundle.fit import LayerVerdict
from ..files.checkpoint import Checkpoint
from ..files.dtypes import to_numpy
from ..files.write import Buffer, TensorWriter, copy_file
from .changes import TensorPlan
from .plan import ShardPlan
from .rounding import Merged, add_deltas, convert

Count = Callable[[int], None]
UNFINISHED = ".writing-"


@dataclass(frozen=True)
class WrittenTensor:
    """A weight that got delta_W added: hashes of its payload in the output and in the base, in hex.

    `survival` and `error` are as in `report.LayerReport`. `verdicts` say for each of its shares, in
    order, what the fingerprint says of the base's weight.
    """

    sha256: str
    source_sha256: str
    survival: float
    error: float
    verdicts: tuple[LayerVerdict, ...]


@dataclass(frozen=True)
class WrittenShard:
    """A weight file that is complete: its name, sha256 and bytes, and its changed tensors."""

    name: str
    sha256: str
    size: int
    tensors: dict[str, WrittenTensor]


def write_shard(
    shard: ShardPlan, target: Path, folder: Path, count: Count | None = None
) -> WrittenShard:
    """Write one weight file, holding few changed tensors at a time, and flush it to the disk.

    It is written in `folder` under a name of its own and renamed to `target` when it is complete.
    Two workers may do this for one shard, if one of them was taken for dead: they write the same
    bytes. `count` is called with the bytes of every piece of payload made.

    Raises:
        BadInputError: a weight that overflows; a base file that changed meanwhile.
        FileAccessError: the file cannot be written.
    """
    count = count or (lambda _: None)
    unfinished = folder / f"{UNFINISHED}{uuid.uuid4().hex}"
    try:
        written = (_write_tensors if shard.tensors else _copy)(shard, unfinished, count)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def _copy(shard: ShardPlan, target: Path, count: Count) -> WrittenShard:
    """A shard that nothing changes, byte for byte."""
    size = shard.source.size
    blocks = _counted(shard.checkpoint.file_blocks(shard.source.path), count)
    return WrittenShard(shard.name, copy_file(target, blocks, size), size, {})


def _write_tensors(shard: ShardPlan, target: Path, count: Count) -> WrittenShard:
    facts: dict[str, tuple[str, float, float, tuple[LayerVerdict, ...]]] = {}
    slots = [plan.slot for plan in shard.tensors]
    with (
        ThreadPoolExecutor(1) as executor,
        TensorWriter(target, slots, shard.source.metadata) as writer,
    ):
        changed = [plan for plan in shard.tensors if plan.shares]
        ahead = _changed_weights(changed, shard.checkpoint, executor)
        for plan in shard.tensors:
            name = plan.slot.name
            if not plan.shares:
                writer.write(name, _payload(plan, shard.checkpoint, count))
                continue
            merged, source_sha256, verdicts = next(ahead)
            writer.write(name, [merged.value], hashed=True)
            facts[name] = (
                source_sha256,
                merged.survival,
                float(f"{merged.error:.6g}"),
                verdicts,
            )
            del merged
            count(plan.slot.nbytes)
        sha256, digests = writer.digest(), writer.digests()
    tensors = {name: WrittenTensor(digests[name], *known) for name, known in facts.items()}
    return WrittenShard(shard.name, sha256, writer.size, tensors)


_Changed = tuple[Merged, str, tuple[LayerVerdict, ...]]


def _changed_weights(
    plans: Sequence[TensorPlan], checkpoint: Checkpoint, executor: Executor
) -> Iterator[_Changed]:
    """`_change` of each plan; the next one is worked on while the caller writes one."""
    waiting: list[Future[_Changed]] = []
    for plan in plans:
        waiting.append(executor.submit(_change, plan, checkpoint))
        if len(waiting) > 1:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _change(plan: TensorPlan, checkpoint: Checkpoint) -> _Changed:
    """Read a weight, compare it with the bundles' fingerprints, add delta_W."""
    if plan.source is None:
        raise ValueError(f"{plan.slot.name} has no weight that delta_W is added to")
    digest = hashlib.sha256()
    weight = checkpoint.read_new(plan.source.name, digest)
    found = fingerprint(weight, digest.digest())
    expected = [share.bundle.layer(share.layer).fingerprint for share in plan.shares]
    verdicts: tuple[LayerVerdict, ...] = tuple(
        "unchecked" if one is None else judge(one, found) for one in expected
    )
    merged = add_deltas(
        weight,
        [share.term() for share in plan.shares],
        transposed=plan.transposed,
        dtype=plan.slot.dtype,
        name=plan.slot.name,
        overwrite=True,
    )
    return merged, digest.hexdigest(), verdicts


def _payload(plan: TensorPlan, checkpoint: Checkpoint, count: Count) -> Iterator[Buffer]:
    """The pieces of the payload of a tensor that gets no delta_W."""
    slot, source = plan.slot, plan.source
    if plan.value is not None:
        yield convert(plan.value, slot.dtype, slot.name)
        count(slot.nbytes)
    if source is None:
        return
    for block in checkpoint.blocks(source.name):
        if source.dtype == slot.dtype:
            yield block
        else:
            yield convert(np.frombuffer(block, to_numpy(source.dtype)), slot.dtype, slot.name)
        count(len(block) * slot.nbytes // max(source.nbytes, 1))


def _counted(blocks: Iterator[bytes], count: Count) -> Iterator[bytes]:
    for block in blocks:
        count(len(block))
        yield block
