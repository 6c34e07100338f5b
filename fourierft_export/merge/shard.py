"""One weight file of the output, from start to end: a merge is these, in any order, anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.fingerprint import fingerprint, judge
from ..errors import BadInputError
from ..files.checkpoint import Checkpoint
from ..files.clone import try_clone
from ..files.container import TensorInfo
from ..files.staging import sync
from ..files.write import Buffer, TensorWriter, copy_file
from .changes import LayerChange
from .plan import OutShard, OutTensor
from .tensors import as_array, converted, merged

Count = Callable[[int], None]
_NOTHING = np.empty(0)


@dataclass(frozen=True)
class WrittenTensor:
    """A weight that got delta_W added.

    Attributes:
        sha256: of its payload in the output, in hex.
        source_sha256: of the base's payload.
        survival, error: as in `report.LayerReport`.
        verdicts: for each bundle's share, in order, what the fingerprint says of the base's weight;
            None where the bundle has none.
    """

    sha256: str
    source_sha256: str
    survival: float
    error: float
    verdicts: tuple[str | None, ...]


@dataclass(frozen=True)
class WrittenShard:
    """What came of one weight file.

    Attributes:
        name: its file name.
        sha256: of the whole file, in hex.
        size: its bytes.
        tensors: by their names in the output, those that got delta_W.
    """

    name: str
    sha256: str
    size: int
    tensors: dict[str, WrittenTensor]


@dataclass(frozen=True)
class _Changed:
    """A weight with delta_W, and what is known of it."""

    value: np.ndarray[Any, Any]
    source_sha256: str
    survival: float
    error: float
    verdicts: tuple[str | None, ...]

    def written(self, sha256: str) -> WrittenTensor:
        return WrittenTensor(sha256, self.source_sha256, self.survival, self.error, self.verdicts)


def _changed(change: LayerChange, checkpoint: Checkpoint, dtype: str, name: str) -> _Changed:
    """Read a weight, compare it with the bundles' fingerprints, add delta_W."""
    digest = hashlib.sha256()
    weight = checkpoint.read_new(change.source, digest)
    found = fingerprint(weight, digest.digest())
    layers = [part.ingredient.bundle.layer(part.layer) for part in change.parts]
    verdicts = [
        None if layer.fingerprint is None else judge(layer.fingerprint, found) for layer in layers
    ]
    result = merged(
        weight,
        [part.term() for part in change.parts],
        transposed=change.transposed,
        dtype=dtype,
        name=name,
        overwrite=True,
    )
    error = float(f"{result.error:.6g}")
    return _Changed(result.value, digest.hexdigest(), result.survival, error, tuple(verdicts))


class _Ahead:
    """The changed weights of a shard in their order, each worked out while others are written."""

    def __init__(self, shard: OutShard, checkpoint: Checkpoint, executor: Executor) -> None:
        self._left = iter([t for t in shard.tensors if t.change is not None])
        self._checkpoint = checkpoint
        self._executor = executor
        self._next = self._begin()

    def _begin(self) -> Future[_Changed] | None:
        tensor = next(self._left, None)
        if tensor is None or tensor.change is None:
            return None
        slot = tensor.slot
        return self._executor.submit(
            _changed, tensor.change, self._checkpoint, slot.dtype, slot.name
        )

    def take(self) -> _Changed:
        """The next one; the work on the one after it begins."""
        if self._next is None:
            raise ValueError("a shard has no more changed weights")
        result = self._next.result()
        self._next = self._begin()
        return result


def write_shard(
    shard: OutShard, target: Path, checkpoint: Checkpoint, count: Count
) -> WrittenShard:
    """Write one weight file, holding few changed tensors at a time, and flush it to the disk.

    Args:
        shard: what it holds.
        target: the file; it may not exist.
        checkpoint: the base.
        count: told of every piece of payload made, in bytes.

    Raises:
        BadInputError: a weight that overflows; a base file that changed meanwhile.
        FileAccessError: the file cannot be written.
    """
    if not shard.tensors:
        return _copied(shard, target, checkpoint, count)
    known: dict[str, _Changed] = {}
    slots = [tensor.slot for tensor in shard.tensors]
    with (
        ThreadPoolExecutor(1) as executor,
        TensorWriter(target, slots, shard.source.metadata) as writer,
    ):
        ahead = _Ahead(shard, checkpoint, executor)
        for tensor in shard.tensors:
            slot = tensor.slot
            if tensor.change is None:
                writer.write(slot.name, _payload(tensor, checkpoint, count))
                continue
            changed = ahead.take()
            writer.write(slot.name, [changed.value], hashed=True)
            known[slot.name] = replace(changed, value=_NOTHING)
            del changed
            count(slot.nbytes)
        sha256, digests = writer.digest(), writer.digests()
    tensors = {name: changed.written(digests[name]) for name, changed in known.items()}
    return WrittenShard(shard.name, sha256, writer.size, tensors)


def _copied(shard: OutShard, target: Path, checkpoint: Checkpoint, count: Count) -> WrittenShard:
    """A shard that nothing changes, byte for byte."""
    path, size = shard.source.path, shard.source.size
    blocks = checkpoint.file_blocks(path)
    if not try_clone(path, target):
        counted = (_counted_one(block, count) for block in blocks)
        return WrittenShard(shard.name, copy_file(target, counted, size), size, {})
    digest = hashlib.sha256()
    for block in blocks:  # these fail if the source has changed since it was opened
        digest.update(_counted_one(block, count))
    sync(target)
    return WrittenShard(shard.name, digest.hexdigest(), size, {})


def _payload(tensor: OutTensor, checkpoint: Checkpoint, count: Count) -> Iterator[Buffer]:
    """The pieces of the payload of a tensor that gets no delta_W."""
    slot, source = tensor.slot, tensor.source
    if source is not None:
        for block in checkpoint.blocks(source.name):
            converts = source.dtype != slot.dtype
            yield _converted_block(block, source, slot.dtype, slot.name) if converts else block
            count(len(block) * slot.nbytes // max(source.nbytes, 1))
    elif tensor.value is not None:
        yield converted(tensor.value, slot.dtype, slot.name)
        count(slot.nbytes)
    else:
        raise BadInputError(f"tensor {slot.name}", expected="a source", found="none")


def _converted_block(block: bytes, source: TensorInfo, dtype: str, name: str) -> Buffer:
    return converted(as_array(block, source.dtype), dtype, name)


def _counted_one(block: bytes, count: Count) -> bytes:
    count(len(block))
    return block
