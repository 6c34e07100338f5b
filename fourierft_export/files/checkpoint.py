"""A safetensors checkpoint of one file or many, read one tensor at a time.

Reads are by position, never through a memory map: a mapped file that shrinks takes the process
with it (SIGBUS), a short read is an ordinary error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import BadInputError, FileAccessError
from .container import TensorInfo, open_regular, read_exactly, read_header
from .dtypes import to_numpy
from .layout import PICKLED, SUFFIX, pickled_error, read_index, weights_file
from .links import checked_file
from .write import Hash

BLOCK = 2 << 20

_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its tensors in the order of the payloads, `__metadata__`, bytes."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    size: int


class Checkpoint:
    """The tensors of a checkpoint, by name. Made by `Checkpoint.open`; never changes.

    Attributes:
        path: what was opened: a folder, or one .safetensors file.
        index: the shard index; None for a single file.
        index_metadata: what the index says under "metadata".
        shards: its files, in the order of their names.
        tensors: every tensor by name; each knows its file.
    """

    def __init__(
        self,
        path: Path,
        shards: tuple[Shard, ...],
        stamps: Mapping[Path, _Stamp],
        index: Path | None = None,
        index_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.index = index
        self.index_metadata: Mapping[str, Any] = MappingProxyType(dict(index_metadata or {}))
        self.parts = shards
        self.shards: tuple[Path, ...] = tuple(shard.path for shard in shards)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {info.name: info for shard in shards for info in shard.tensors}
        )
        self._stamps = stamps

    def __reduce__(self) -> tuple[type[Checkpoint], tuple[Any, ...]]:  # views do not pickle
        fields = (self.path, self.parts, self._stamps, self.index, dict(self.index_metadata))
        return Checkpoint, fields

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_links: bool = False) -> Checkpoint:
        """Open a Hugging Face folder (one file or sharded) or a single .safetensors file.

        Reads every header, no payload. With `allow_links`, links between files of the folder are
        followed.

        Raises:
            FileAccessError: the path, or a shard that the index names, cannot be read.
            BadInputError: a damaged or hostile file or index, a missing shard, a pickled
                checkpoint, a folder without weights.
        """
        path = Path(path)
        try:
            is_folder = path.is_dir()
            exists = is_folder or path.exists()
        except (OSError, ValueError) as error:
            raise FileAccessError(path, expected="a checkpoint", found=str(error)) from None
        if not exists:
            raise FileAccessError(path, expected="a checkpoint", found="nothing there")
        if not is_folder:
            return cls._open_files(path, {path: None})
        file = checked_file(weights_file(path), path, allow_links=allow_links)
        if file.name.endswith(SUFFIX):
            return cls._open_files(path, {file: None})
        listed, metadata = read_index(file)
        wanted = {
            checked_file(path / shard, path, allow_links=allow_links): names
            for shard, names in sorted(listed.items())
        }
        absent = [shard.name for shard in wanted if not shard.exists()]
        if absent:
            raise BadInputError(
                file,
                expected=f"the {len(wanted)} shards that it names",
                found=f"{len(absent)} missing",
                remedy="download the checkpoint again",
                offenders=absent,
            )
        return cls._open_files(path, wanted, file, metadata)

    @classmethod
    def _open_files(
        cls,
        path: Path,
        wanted: Mapping[Path, tuple[str, ...] | None],
        index: Path | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Read the headers of `wanted`: file -> the names the index promises there (None: any)."""
        shards, stamps, absent = [], {}, []
        home: dict[str, Path] = {}
        twice = []
        for file, names in wanted.items():
            if file.suffix in PICKLED:
                raise pickled_error(file)
            stamps[file] = _stamp_of(file)
            header = read_header(file)
            infos = tuple(header.tensors.values())
            shards.append(Shard(file, infos, header.metadata, header.size))
            absent += [f"{n} in {file.name}" for n in names or () if n not in header.tensors]
            twice += [f"{i.name} in {home[i.name].name} and {file.name}" for i in infos
                      if i.name in home]  # fmt: skip
            home.update((info.name, file) for info in infos)
        if absent or twice:
            raise BadInputError(
                index or path,
                expected="every tensor in exactly the shard that the index names",
                found=f"{len(absent)} not there, {len(twice)} in two shards",
                remedy="the index and the shards do not belong together: download them again",
                offenders=[*absent, *twice],
            )
        return cls(path, tuple(shards), stamps, index, metadata)

    def info(self, name: str) -> TensorInfo:
        """Where the tensor `name` lies; BadInputError if there is none."""
        if name not in self.tensors:
            raise BadInputError(f"{self.path}, tensor {name!r}", expected="to be there")
        return self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        """One tensor as a read-only array of its own dtype (bfloat16 as `ml_dtypes.bfloat16`).

        Raises:
            BadInputError: no such tensor; a dtype that numpy cannot hold; a file that changed.
        """
        array = self.read_new(name)
        array.setflags(write=False)
        return array

    def read_new(self, name: str, digest: Hash | None = None) -> np.ndarray:
        """One tensor as `read`, as an array that may be changed; `digest` gets its bytes."""
        info = self.info(name)
        try:
            dtype = to_numpy(info.dtype)
        except KeyError:
            raise BadInputError(
                f"{info.path}, tensor {name!r}",
                expected="a dtype with whole bytes per element",
                found=info.dtype,
            ) from None
        array = np.empty(info.shape, dtype)
        at, memory = 0, array.reshape(-1).view(np.uint8)
        for block in self.blocks(name):
            memory[at : at + len(block)] = np.frombuffer(block, np.uint8)
            at += len(block)
            if digest is not None:
                digest.update(memoryview(block))
        return array

    def read_elements(self, name: str, positions: Iterable[int]) -> np.ndarray:
        """Single elements of a tensor, by their flat positions; errors as `read`."""
        info = self.info(name)
        dtype = to_numpy(info.dtype)
        starts = [info.start + dtype.itemsize * int(position) for position in positions]
        path = _path_of(info)
        pieces = [b"".join(self._span(path, at, at + dtype.itemsize, BLOCK)) for at in starts]
        return np.frombuffer(b"".join(pieces), dtype)

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[bytes]:
        """The bytes of one tensor in pieces of at most `size`, whatever its dtype."""
        info = self.info(name)
        yield from self._span(_path_of(info), info.start, info.stop, size)

    def file_blocks(self, shard: Path, size: int = BLOCK) -> Iterator[bytes]:
        """The bytes of a whole shard in pieces of at most `size`."""
        yield from self._span(shard, 0, self._stamps[shard][1], size)

    def _span(self, file: Path, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Bytes [start, stop) of `file`, which must still be the file that was opened."""
        fd = open_regular(file)
        try:
            for at in range(start, stop, size):
                block = read_exactly(fd, at, min(at + size, stop), file)
                if _stamp(os.fstat(fd)) != self._stamps[file]:
                    raise BadInputError(
                        file,
                        expected="a file that stays as it is while it is read",
                        found="one that changed since it was opened",
                        remedy="run again when nothing else writes to it",
                    )
                yield block
        finally:
            os.close(fd)


def _path_of(info: TensorInfo) -> Path:
    if info.path is None:
        raise BadInputError(f"tensor {info.name!r}", expected="a tensor that lies in a file")
    return info.path


def _stamp(status: os.stat_result) -> _Stamp:
    # Without the device's number, which may differ between machines that share a file system.
    return status.st_ino, status.st_size, status.st_mtime_ns


def _stamp_of(file: Path) -> _Stamp:
    fd = open_regular(file)
    try:
        return _stamp(os.fstat(fd))
    finally:
        os.close(fd)
