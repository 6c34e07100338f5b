"""One weight file of the output, from start to end: a merge is these, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.write import Buffer, TensorWriter, copy_file
from ..errors import BadInputError
from .plan import OutShard, OutTensor
from .tensors import converted, merged

Count = Callable[[int], None]


@dataclass(frozen=True)
class WrittenShard:
    """What came of one weight file.

    Attributes:
        name: its file name.
        sha256: of the whole file, in hex.
        survival: output tensor -> share of its weights that changed, where delta_W was added.
    """

    name: str
    sha256: str
    survival: dict[str, float] = field(default_factory=dict)


def write_shard(
    shard: OutShard, target: Path, checkpoint: Checkpoint, count: Count
) -> WrittenShard:
    """Write one weight file, holding one tensor at a time.

    Args:
        shard: what it holds.
        target: the file; it may not exist.
        checkpoint: the base.
        count: told of every piece of payload written, in bytes.

    Raises:
        BadInputError: a weight that overflows; a base file that changed meanwhile.
        FileAccessError: the file cannot be written.
    """
    if not shard.tensors:
        blocks = _counted(checkpoint.file_blocks(shard.source.path), count)
        return WrittenShard(shard.name, copy_file(target, blocks, shard.source.size))
    survival: dict[str, float] = {}
    slots = [tensor.slot for tensor in shard.tensors]
    with TensorWriter(target, slots, shard.source.metadata) as writer:
        for tensor in shard.tensors:
            writer.write(tensor.slot.name, _payload(tensor, checkpoint, survival, count))
        return WrittenShard(shard.name, writer.digest(), survival)


def _payload(
    tensor: OutTensor, checkpoint: Checkpoint, survival: dict[str, float], count: Count
) -> Iterator[Buffer]:
    """The pieces of one tensor's payload."""
    slot, source, change = tensor.slot, tensor.source, tensor.change
    if source is not None and source.dtype == slot.dtype:
        yield from _counted(checkpoint.blocks(source.name), count)
        return
    if change is not None:
        result = merged(
            checkpoint.read(change.source),
            [part.term() for part in change.parts],
            transposed=change.transposed,
            dtype=slot.dtype,
            name=slot.name,
        )
        survival[slot.name] = result.survival
        yield result.value
    elif source is not None:
        yield converted(checkpoint.read(source.name), slot.dtype, slot.name)
    elif tensor.value is not None:
        yield converted(tensor.value, slot.dtype, slot.name)
    else:
        raise BadInputError(f"tensor {slot.name}", expected="a source", found="none")
    count(slot.nbytes)


def _counted(blocks: Iterator[bytes], count: Count) -> Iterator[bytes]:
    for block in blocks:
        yield block
        count(len(block))
