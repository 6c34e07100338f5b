"""Writes one weight file of a merge, in any process."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle.fingerprint import compare_fingerprints, fingerprint
from ..bundle.fit import LayerVerdict
from ..files.checkpoint import Checkpoint
from ..files.dtypes import to_numpy
from ..files.hashed_write import Buffer, view_bytes, write_file
from ..files.safetensors_reader import encode_header
from ..types import Array
from .changes import TensorPlan
from .plan import ShardPlan
from .rounding import add_deltas, convert

Count = Callable[[int], None]
UNFINISHED = ".writing-"


@dataclass(frozen=True)
class WrittenTensor:
    """A weight that got delta_W added: hashes of its payloads, effect of rounding, verdicts."""

    sha256: str
    source_sha256: str
    survival: float
    error: float | None
    verdicts: tuple[LayerVerdict, ...]  # of the fingerprint in each of its shares


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
    `count` is called with the bytes of every piece.
    """
    tensors: dict[str, WrittenTensor] = {}
    unfinished = folder / f"{UNFINISHED}{uuid.uuid4().hex}"
    try:
        with ThreadPoolExecutor(1) as executor:
            if shard.tensors:
                pieces = _make_pieces(shard, executor, tensors)
            else:
                pieces = shard.checkpoint.read_file_blocks(shard.source.path)
            sha256 = write_file(unfinished, _counted(pieces, count or (lambda _: None)))
        size = unfinished.stat().st_size
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return WrittenShard(shard.name, sha256, size, tensors)


def _make_pieces(
    shard: ShardPlan, executor: ThreadPoolExecutor, written: dict[str, WrittenTensor]
) -> Iterator[Buffer]:
    """Yield the bytes of a shard; the next changed tensor is computed while one is written."""
    yield encode_header(((p.name, p.dtype, p.shape) for p in shard.tensors), shard.source.metadata)
    left = iter([plan for plan in shard.tensors if plan.shares])
    waiting: list[Future[tuple[Array, WrittenTensor]]] = []
    for plan in shard.tensors:
        if not plan.shares:
            yield from _unchanged_pieces(plan, shard.checkpoint)
            continue
        while len(waiting) < 2 and (following := next(left, None)) is not None:
            waiting.append(executor.submit(_change, following, shard.checkpoint))
        value, written[plan.name] = waiting.pop(0).result()
        yield value
        del value


def _change(plan: TensorPlan, checkpoint: Checkpoint) -> tuple[Array, WrittenTensor]:
    """Read a weight, compare it with the bundles' fingerprints, add delta_W."""
    if plan.source is None:
        raise ValueError(f"{plan.name} has no weight that delta_W is added to")
    weight, digest = checkpoint.read_new(plan.source.name, hashed=True)
    found = fingerprint(weight, digest)
    expected = [share.bundle.layer(share.layer).fingerprint for share in plan.shares]
    verdicts: tuple[LayerVerdict, ...] = tuple(
        "unchecked" if one is None else compare_fingerprints(one, found) for one in expected
    )
    value, survival, error = add_deltas(
        weight,
        [share.term() for share in plan.shares],
        transposed=plan.transposed,
        dtype=plan.dtype,
        name=plan.name,
        overwrite=True,
    )
    sha256 = hashlib.sha256(view_bytes(value)).hexdigest()
    error = None if error is None else float(f"{error:.6g}")
    return value, WrittenTensor(sha256, digest.hex(), survival, error, verdicts)


def _unchanged_pieces(plan: TensorPlan, checkpoint: Checkpoint) -> Iterator[Buffer]:
    """Yield the payload of a tensor that gets no delta_W, in the output's dtype."""
    if plan.value is not None:
        yield convert(plan.value, plan.dtype, plan.name)
    elif plan.source is not None:
        for block in checkpoint.read_blocks(plan.source.name):
            if plan.source.dtype == plan.dtype:
                yield block
            else:
                values = np.frombuffer(block, to_numpy(plan.source.dtype))
                yield convert(values, plan.dtype, plan.name)


def _counted(pieces: Iterable[Buffer], count: Count) -> Iterator[Buffer]:
    """Yield the pieces, and call `count` with the bytes of each."""
    for piece in pieces:
        count(view_bytes(piece).nbytes)
        yield piece
