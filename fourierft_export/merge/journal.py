"""What a merge has finished, on the disk before it is believed: one line for each shard.

A line is JSON and the sha256 of it, so one that a kill cut off does not count; it begins with the
line break, so that what was cut off does not take the next line with it. A line counts only if it
speaks of a shard of this very merge, and if that shard's file still has the hash that it states.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FourierFTError
from ..files import strict_json
from ..files.container import open_regular, read_exactly, read_file
from .plan import OutShard
from .shard import WrittenShard, WrittenTensor

_BLOCK = 8 << 20
_VERDICTS = (None, "same", "precision", "different")
_SHARD = {"name": str, "sha256": str, "size": int, "tensors": dict}
_TENSOR = {
    "sha256": str, "source_sha256": str, "survival": float, "error": float, "verdicts": list,
}  # fmt: skip


class Journal:
    """The journal of one merge, appended to by the one process that coordinates it.

    Args:
        path: the file; made when the first line is written.
        shards: what the merge writes.
    """

    def __init__(self, path: Path, shards: Sequence[OutShard]) -> None:
        self.path = path
        self._shards = shards

    def add(self, number: int, shard: WrittenShard) -> None:
        """Record that shard `number` is complete and flushed."""
        text = json.dumps({"number": number, "shard": asdict(shard)}).encode()
        line = b"\n%s %s" % (text, hashlib.sha256(text).hexdigest().encode())
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)

    def verified(
        self, place: Callable[[str], Path], progress: Callable[[int], None]
    ) -> dict[int, WrittenShard]:
        """The shards, by number, that it states and whose files are there with the stated hash.

        Args:
            place: from a shard's name to its file.
            progress: told of the bytes of each good shard.
        """
        good = {}
        for number, shard in self._entries().items():
            if _is_intact(place(shard.name), shard):
                good[number] = shard
                progress(shard.size)
        return good

    def _entries(self) -> dict[int, WrittenShard]:
        """What it states of this merge's shards."""
        try:
            lines = read_file(self.path).split(b"\n")
        except FourierFTError:  # none yet, or none that can be read: everything is written anew
            return {}
        found = {}
        for line in lines:
            text, _, digest = line.rpartition(b" ")
            if digest != hashlib.sha256(text).hexdigest().encode():
                continue
            try:
                fields = strict_json.loads(text, str(self.path))
            except FourierFTError:
                continue
            number = fields.get("number") if isinstance(fields, dict) else None
            if type(number) is int and 0 <= number < len(self._shards):
                shard = _stated(fields.get("shard"), self._shards[number])
                if shard is not None:
                    found[number] = shard
        return found


def _stated(fields: Any, expected: OutShard) -> WrittenShard | None:
    """What a line says of a shard; None unless it has its name and its changed tensors."""
    changes = {t.slot.name: t.change for t in expected.tensors if t.change is not None}
    if not _has(fields, _SHARD) or fields["name"] != expected.name:
        return None
    if fields["tensors"].keys() != changes.keys():
        return None
    tensors = {}
    for name, values in fields["tensors"].items():
        if not _has(values, _TENSOR):
            return None
        verdicts = tuple(values["verdicts"])
        known = all(verdict in _VERDICTS for verdict in verdicts)
        if not known or len(verdicts) != len(changes[name].parts):
            return None
        tensors[name] = WrittenTensor(**{**values, "verdicts": verdicts})
    return WrittenShard(**{**fields, "tensors": tensors})


def _has(fields: Any, kinds: Mapping[str, type]) -> bool:
    """Whether `fields` is a JSON object of just these keys and types."""
    return (
        isinstance(fields, dict)
        and fields.keys() == kinds.keys()
        and all(type(fields[key]) is kind for key, kind in kinds.items())
    )


def _is_intact(path: Path, shard: WrittenShard) -> bool:
    try:
        return file_sha256(path) == (shard.sha256, shard.size)
    except FourierFTError:
        return False


def file_sha256(path: Path) -> tuple[str, int]:
    """The sha256 of a regular file, in hex, and its size.

    Raises:
        FileAccessError: missing or unreadable.
        BadInputError: not a regular file.
    """
    digest = hashlib.sha256()
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        for at in range(0, size, _BLOCK):
            digest.update(read_exactly(fd, at, min(at + _BLOCK, size), path))
    finally:
        os.close(fd)
    return digest.hexdigest(), size
