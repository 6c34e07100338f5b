"""The journal of a merge: one line of JSON for each finished shard, flushed to the disk.

A line begins with the line break, so that one which a kill cut off does not take the next one with
it. A line counts only if it describes a shard of this very merge, and if that shard's file still
has the hash that it states.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ..bundle.fit import LayerVerdict
from ..errors import FourierFTError
from ..files import strict_json
from ..files.container import read_file
from .base_files import hash_file
from .plan import ShardPlan, list_changed_tensors
from .shard import Count, WrittenShard, WrittenTensor

_TENSOR_KINDS = {"sha256": str, "source_sha256": str, "survival": float, "error": float,
                 "verdicts": list}  # fmt: skip


class Journal:
    """The journal of one merge, appended to by the one process that coordinates it."""

    def __init__(self, path: Path, shards: Sequence[ShardPlan]) -> None:
        self.path = path
        self._shards = shards

    def add(self, number: int, shard: WrittenShard) -> None:
        """Record that shard `number` is complete and flushed."""
        line = b"\n" + json.dumps({"number": number, **asdict(shard)}).encode()
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)

    def read_finished(self, place: Callable[[str], Path], count: Count) -> dict[int, WrittenShard]:
        """Read which shards are finished: those listed whose files have the stated hash.

        `place` gives the file of a shard's name; `count` is called with the bytes of each of them.
        """
        try:
            lines = read_file(self.path).split(b"\n")
        except FourierFTError:  # none yet, or none that can be read: everything is written anew
            return {}
        good = {}
        for line in lines:
            try:
                fields = strict_json.loads(line, str(self.path))
                number, shard = _parsed(fields, self._shards)
                file = place(shard.name)
                if hash_file(file.parent, file.name) == (shard.sha256, shard.size):
                    good[number] = shard
            except (FourierFTError, AttributeError, KeyError, TypeError, ValueError):
                continue  # cut off, or not of this merge
        for shard in good.values():
            count(shard.size)
        return good


def _parsed(fields: Any, shards: Sequence[ShardPlan]) -> tuple[int, WrittenShard]:
    """Parse and check a line; ValueError, TypeError or KeyError if it is not of this merge."""
    number = fields.pop("number") if isinstance(fields, dict) else None
    if type(number) is not int or not 0 <= number < len(shards):
        raise ValueError("not a shard of this merge")
    shard = WrittenShard(**fields)
    expected = list_changed_tensors([shards[number]])
    if shard.name != shards[number].name or shard.tensors.keys() != expected.keys():
        raise ValueError("another shard")
    tensors = {}
    for name, values in fields["tensors"].items():
        kinds = {key: type(value) for key, value in values.items()}
        if kinds != _TENSOR_KINDS or len(values["verdicts"]) != len(expected[name].shares):
            raise ValueError("another tensor")
        if not all(verdict in get_args(LayerVerdict) for verdict in values["verdicts"]):
            raise ValueError("an unknown verdict")
        tensors[name] = WrittenTensor(**{**values, "verdicts": tuple(values["verdicts"])})
    return number, WrittenShard(shard.name, shard.sha256, shard.size, tensors)
