"""A safetensors checkpoint of one file or many, read one tensor at a time.

Reads are by position, never through a memory map: a mapped file that shrinks takes the process
with it (SIGBUS), a short read is an ordinary error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInputError, FileAccessError
from .container import Header, TensorInfo, open_regular, read_exactly, read_header, read_stamp
from .dtypes import to_numpy
from .layout import PICKLED, SUFFIX, find_weights_file, make_pickled_error, read_index
from .links import check_link
from .write import Hash

BLOCK = 2 << 20


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a checkpoint, by name. Made by `Checkpoint.open`; never changes.

    Attributes:
        path: what was opened: a folder, or one .safetensors file.
        headers: of its files, in the order of their names.
        index: the shard index; None for a single file.
        index_metadata: what the index says under "metadata".
    """

    path: Path
    headers: tuple[Header, ...]
    index: Path | None = None
    index_metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> tuple[Path, ...]:
        """Its files, in the order of their names."""
        return tuple(header.path for header in self.headers)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name; each knows its file."""
        return {name: info for header in self.headers for name, info in header.tensors.items()}

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_links: bool = False) -> Checkpoint:
        """Open a Hugging Face folder (one file or sharded) or a single .safetensors file.

        Reads every header, no payload.

        Args:
            path: the folder or file.
            allow_links: follow links between files of the folder.

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
            return cls._open_files(path, {path: ()})
        file = check_link(find_weights_file(path), path, allow_links=allow_links)
        if file.name.endswith(SUFFIX):
            return cls._open_files(path, {file: ()})
        listed, metadata = read_index(file)
        names_in = {
            check_link(path / shard, path, allow_links=allow_links): names
            for shard, names in sorted(listed.items())
        }
        absent = [shard.name for shard in names_in if not shard.exists()]
        if absent:
            raise BadInputError(
                file,
                expected=f"the {len(names_in)} shards that it names",
                found=f"{len(absent)} missing",
                remedy="download the checkpoint again",
                offenders=absent,
            )
        return cls._open_files(path, names_in, file, metadata)

    @classmethod
    def _open_files(
        cls,
        path: Path,
        names_in: Mapping[Path, tuple[str, ...]],
        index: Path | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Read the headers of files; `names_in` are the tensors that the index promises in each."""
        headers, absent, twice = [], [], []
        home: dict[str, Path] = {}
        for file, names in names_in.items():
            if file.suffix in PICKLED:
                raise make_pickled_error(file)
            header = read_header(file)
            headers.append(header)
            absent += [f"{n} in {file.name}" for n in names if n not in header.tensors]
            twice += [f"{n} in {home[n].name} and {file.name}" for n in header.tensors if n in home]
            home.update(dict.fromkeys(header.tensors, file))
        if absent or twice:
            raise BadInputError(
                index or path,
                expected="every tensor in exactly the shard that the index names",
                found=f"{len(absent)} not there, {len(twice)} in two shards",
                remedy="the index and the shards do not belong together: download them again",
                offenders=[*absent, *twice],
            )
        return cls(path, tuple(headers), index, metadata or {})

    def info(self, name: str) -> TensorInfo:
        """Find where the tensor `name` lies; BadInputError if there is none."""
        if name not in self.tensors:
            raise BadInputError(self.path, expected=f"a tensor {name!r}", found="no such tensor")
        return self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        """Read one tensor: a read-only array of its dtype (bfloat16 as `ml_dtypes.bfloat16`).

        Raises:
            BadInputError: no such tensor; a dtype that numpy cannot hold; a file that changed.
            FileAccessError: the file cannot be read.
        """
        array = self.read_new(name)
        array.setflags(write=False)
        return array

    def read_new(self, name: str, digest: Hash | None = None) -> np.ndarray:
        """Read one tensor as an array that may be changed, and update `digest` with its bytes."""
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
        for block in self.read_blocks(name):
            memory[at : at + len(block)] = np.frombuffer(block, np.uint8)
            at += len(block)
            if digest is not None:
                digest.update(memoryview(block))
        return array

    def read_elements(self, name: str, positions: Iterable[int]) -> np.ndarray:
        """Read single elements of a tensor, by their positions in C order."""
        info = self.info(name)
        dtype = to_numpy(info.dtype)
        starts = [info.start + dtype.itemsize * int(position) for position in positions]
        pieces = (self._span(info.path, at, at + dtype.itemsize, BLOCK) for at in starts)
        return np.frombuffer(b"".join(block for piece in pieces for block in piece), dtype)

    def read_blocks(self, name: str, size: int = BLOCK) -> Iterator[bytes]:
        """Yield the bytes of one tensor in pieces of at most `size`, whatever its dtype."""
        info = self.info(name)
        yield from self._span(info.path, info.start, info.stop, size)

    def read_file_blocks(self, shard: Path, size: int = BLOCK) -> Iterator[bytes]:
        """Yield the bytes of a whole shard in pieces of at most `size`."""
        yield from self._span(shard, 0, self._headers_by_path[shard].size, size)

    @cached_property
    def _headers_by_path(self) -> Mapping[Path, Header]:
        return {header.path: header for header in self.headers}

    def _span(self, path: Path, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file that must still be the one that was opened."""
        with open(open_regular(path), "rb") as file:
            for at in range(start, stop, size):
                block = read_exactly(file.fileno(), at, min(at + size, stop), path)
                if read_stamp(file.fileno()) != self._headers_by_path[path].stamp:
                    raise BadInputError(
                        path,
                        expected="a file that nothing writes to while it is read",
                        found="one that changed since it was opened",
                        remedy="run again when nothing else writes to it",
                    )
                yield block
