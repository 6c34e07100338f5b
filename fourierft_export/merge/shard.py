"""Writes one weight file of a merge, in any process."""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..bundle.fingerprint import compare_fingerprints, fingerprint
from ..bundle.fit import LayerVerdict
from ..files.checkpoint import Checkpoint
from ..files.dtypes import to_numpy
from ..files.write import Buffer, Hash, TensorWriter, copy_file, view_bytes
from ..types import Array
from .changes import TensorPlan
from .plan import ShardPlan
from .rounding import add_deltas, convert

Count = Callable[[int], None]
UNFINISHED = ".writing-"


@dataclass(frozen=True)
class WrittenTensor:
    """A weight that got delta_W added.

    Attributes:
        sha256: of its payload in the output, in hex.
        source_sha256: of its payload in the base.
        survival: share of its elements that changed once rounded.
        error: of what was really added, relative to delta_W (Frobenius norms).
        verdicts: for each of its shares, the comparison of the bundle's fingerprint and the weight.
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

    It is written in `folder` under a random name and renamed to `target` when it is complete. Two
    workers may do this for one shard, if one of them was taken for dead: they write the same bytes.

    Args:
        shard: what to write.
        target: the file.
        folder: on the same disk.
        count: called with the bytes of every piece of payload made.

    Raises:
        BadInputError: a weight that overflows; a base file that changed meanwhile.
        FileAccessError: the base cannot be read.
        OSError: the file cannot be written.
    """
    count = count or (lambda _: None)
    unfinished = folder / f"{UNFINISHED}{uuid.uuid4().hex}"
    try:
        if shard.tensors:
            written = _write_tensors(shard, unfinished, count)
        else:
            blocks = shard.checkpoint.read_file_blocks(shard.source.path)
            sha256 = copy_file(unfinished, _counted(blocks, count))
            written = WrittenShard(shard.name, sha256, shard.source.size, {})
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def _write_tensors(shard: ShardPlan, target: Path, count: Count) -> WrittenShard:
    """Write a shard of which some tensors change."""
    tensors: dict[str, WrittenTensor] = {}
    digests: dict[str, Hash] = {}
    slots = [plan.slot for plan in shard.tensors]
    with (
        ThreadPoolExecutor(1) as executor,
        TensorWriter(target, slots, shard.source.metadata) as writer,
    ):
        changed = _changed_weights(shard, executor)
        for plan in shard.tensors:
            if not plan.shares:
                writer.write(_counted(_payload(plan, shard.checkpoint), count))
                continue
            name = plan.slot.name
            value, tensors[name] = next(changed)
            digests[name] = hashlib.sha256()
            writer.write([value], digests[name])
            del value
            count(plan.slot.nbytes)
        sha256 = writer.finish()
    hashed = {n: replace(one, sha256=digests[n].hexdigest()) for n, one in tensors.items()}
    return WrittenShard(shard.name, sha256, writer.size, hashed)


_Changed = tuple[Array, WrittenTensor]


def _changed_weights(shard: ShardPlan, executor: Executor) -> Iterator[_Changed]:
    """Yield the changed tensors; the next one is worked on while the caller writes one."""
    waiting: list[Future[_Changed]] = []
    for plan in (plan for plan in shard.tensors if plan.shares):
        waiting.append(executor.submit(_change, plan, shard.checkpoint))
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
        "unchecked" if one is None else compare_fingerprints(one, found) for one in expected
    )
    merged = add_deltas(
        weight,
        [share.term() for share in plan.shares],
        transposed=plan.transposed,
        dtype=plan.slot.dtype,
        name=plan.slot.name,
        overwrite=True,
    )
    # A base weight with NaN in it has no such error; JSON has no NaN.
    error = float(f"{merged.error:.6g}") if math.isfinite(merged.error) else 0.0
    return merged.value, WrittenTensor("", digest.hexdigest(), merged.survival, error, verdicts)


def _payload(plan: TensorPlan, checkpoint: Checkpoint) -> Iterator[Buffer]:
    """Yield the pieces of the payload of a tensor that gets no delta_W."""
    slot, source = plan.slot, plan.source
    if plan.value is not None:
        yield convert(plan.value, slot.dtype, slot.name)
    elif source is not None:
        for block in checkpoint.read_blocks(source.name):
            same = source.dtype == slot.dtype
            yield (
                block
                if same
                else convert(np.frombuffer(block, to_numpy(source.dtype)), slot.dtype, slot.name)
            )


_Piece = TypeVar("_Piece", bound=Buffer)


def _counted(pieces: Iterable[_Piece], count: Count) -> Iterator[_Piece]:
    """Yield the pieces, and call `count` with the bytes of each."""
    for piece in pieces:
        count(view_bytes(piece).nbytes)
        yield piece
