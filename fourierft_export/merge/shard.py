"""One weight file of the output, from start to end: a merge is these, in any order, anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.fingerprint import fingerprint, judge
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.clone import try_clone
from ..checkpoint.container import TensorInfo
from ..checkpoint.staging import sync
from ..checkpoint.write import Buffer, TensorWriter, copy_file
from ..errors import BadInputError
from .changes import LayerChange
from .plan import OutShard, OutTensor
from .tensors import as_array, converted, merged

Count = Callable[[int], None]


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

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> WrittenShard:
        """The inverse of `dataclasses.asdict`, also after a journey through JSON."""
        tensors = {
            name: WrittenTensor(**{**values, "verdicts": tuple(values["verdicts"])})
            for name, values in fields["tensors"].items()
        }
        return cls(fields["name"], fields["sha256"], fields["size"], tensors)


class _Change:
    """The work on one weight: what is read, checked, changed, and known of it afterwards."""

    def __init__(self, change: LayerChange, dtype: str, name: str) -> None:
        self._change = change
        self._dtype = dtype
        self._name = name

    def payload(self, checkpoint: Checkpoint) -> Iterator[Buffer]:
        change, digest = self._change, hashlib.sha256()
        weight = checkpoint.read_new(change.source, digest)
        self.source_sha256 = digest.hexdigest()
        found = fingerprint(weight, digest.digest())
        layers = [part.ingredient.bundle.layer(part.layer) for part in change.parts]
        self.verdicts = tuple(
            None if layer.fingerprint is None else judge(layer.fingerprint, found)
            for layer in layers
        )
        result = merged(
            weight,
            [part.term() for part in change.parts],
            transposed=change.transposed,
            dtype=self._dtype,
            name=self._name,
            overwrite=True,
        )
        self.survival, self.error = result.survival, float(f"{result.error:.6g}")
        yield result.value

    def written(self, sha256: str) -> WrittenTensor:
        return WrittenTensor(sha256, self.source_sha256, self.survival, self.error, self.verdicts)


def write_shard(
    shard: OutShard, target: Path, checkpoint: Checkpoint, count: Count
) -> WrittenShard:
    """Write one weight file, holding one changed tensor at a time, and flush it to the disk.

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
    changes: dict[str, _Change] = {}
    slots = [tensor.slot for tensor in shard.tensors]
    with TensorWriter(target, slots, shard.source.metadata) as writer:
        for tensor in shard.tensors:
            name = tensor.slot.name
            if tensor.change is not None:
                changes[name] = _Change(tensor.change, tensor.slot.dtype, name)
                pieces = _counted(changes[name].payload(checkpoint), tensor.slot.nbytes, count)
            else:
                pieces = _payload(tensor, checkpoint, count)
            writer.write(name, pieces, hashed=tensor.change is not None)
        sha256, digests = writer.digest(), writer.digests()
    tensors = {name: change.written(digests[name]) for name, change in changes.items()}
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


def _counted(pieces: Iterator[Buffer], nbytes: int, count: Count) -> Iterator[Buffer]:
    yield from pieces
    count(nbytes)


def _counted_one(block: bytes, count: Count) -> bytes:
    count(len(block))
    return block
