"""What a merge has finished, on the disk before it is believed: one line of JSON for each shard.

A line that was cut off by a kill does not parse and does not count; a finished shard counts only if
its file still has the hash that its line states.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..checkpoint.container import open_regular, read_exactly
from ..errors import FourierFTError
from .shard import WrittenShard

_BLOCK = 8 << 20


class Journal:
    """The journal of one merge, appended to by the one process that coordinates it.

    Args:
        path: the file; made when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, number: int, shard: WrittenShard) -> None:
        """Record that shard `number` is complete and flushed."""
        line = json.dumps({"number": number, "shard": asdict(shard)}) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(fd, line.encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def entries(self) -> dict[int, WrittenShard]:
        """What it states; lines that were cut off are left out."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        found = {}
        for line in lines:
            try:
                fields = json.loads(line)
                found[int(fields["number"])] = WrittenShard.from_dict(fields["shard"])
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def verified(
        self, place: Callable[[str], Path], progress: Callable[[int], None]
    ) -> dict[int, WrittenShard]:
        """The shards whose files are there and have the stated hash; other files are removed.

        Args:
            place: from a shard's name to its file.
            progress: told of the bytes of each good shard.
        """
        good = {}
        for number, shard in self.entries().items():
            path = place(shard.name)
            if _is_intact(path, shard):
                good[number] = shard
                progress(shard.size)
            else:
                path.unlink(missing_ok=True)
        return good


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
