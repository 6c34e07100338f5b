"""A safetensors checkpoint of one file or many, read one tensor at a time.

Reads are by position, never through a memory map: a mapped file that shrinks takes the process
with it (SIGBUS), a short read is an ordinary error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInputError, FileAccessError
from . import strict_json
from .dtypes import to_numpy
from .safe_paths import check_link, is_plain_path
from .safetensors_reader import (
    Header,
    TensorInfo,
    open_regular,
    read_exactly,
    read_file,
    read_header,
    read_stamp,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_INDEX_BYTES = 256 << 20
MAX_SHARDS = 10_000
BLOCK = 2 << 20


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a checkpoint, by name. Made by `Checkpoint.open`; never changes."""

    path: Path  # what was opened: a folder, or one .safetensors file
    headers: tuple[Header, ...]  # of its files, in the order of their names
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
        """Open a Hugging Face folder (one file or sharded) or a .safetensors file: headers only."""
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
        file = check_link(_find_weights_file(path), path, allow_links=allow_links)
        if file.name.endswith(SUFFIX):
            return cls._open_files(path, {file: ()})
        names_in, metadata = _read_index(file)
        shards = {
            check_link(path / name, path, allow_links=allow_links): names_in[name]
            for name in sorted(names_in)
        }
        return cls._open_files(path, shards, file, metadata)

    @classmethod
    def _open_files(
        cls,
        path: Path,
        names_in: Mapping[Path, list[str] | tuple[()]],
        index: Path | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Read the headers of files; `names_in` are the tensors that the index promises in each."""
        headers, absent, twice = [], [], []
        home: dict[str, Path] = {}
        for file, names in names_in.items():
            if file.suffix in PICKLED:
                raise _pickled_error(file)
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
        """Read one tensor: a read-only array of its dtype (bfloat16 as `ml_dtypes.bfloat16`)."""
        array, _ = self.read_new(name)
        array.setflags(write=False)
        return array

    def read_new(self, name: str, *, hashed: bool = False) -> tuple[np.ndarray, bytes]:
        """Read one tensor as an array that may be changed, and its sha256 if `hashed`."""
        info = self.info(name)
        try:
            dtype = to_numpy(info.dtype)
        except KeyError:
            raise BadInputError(
                f"{info.path}, tensor {name!r}",
                expected="a dtype with whole bytes per element",
                found=info.dtype,
            ) from None
        array, digest, at = np.empty(info.shape, dtype), hashlib.sha256(), 0
        memory = array.reshape(-1).view(np.uint8)
        for block in self.read_blocks(name):
            memory[at : at + len(block)] = np.frombuffer(block, np.uint8)
            at += len(block)
            if hashed:
                digest.update(block)
        return array, digest.digest() if hashed else b""

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


def _list_folder(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        found = error.strerror or str(error)
        raise FileAccessError(folder, expected="a readable folder", found=found) from None


def _find_weights_file(directory: Path) -> Path:
    """Find the weights that transformers looks for, or else the only index or .safetensors file."""
    for name in (SINGLE, INDEX):
        if os.path.lexists(directory / name):
            return directory / name
    names = _list_folder(directory)
    indices = [n for n in names if n.endswith(f"{SUFFIX}.index.json")]
    files = [n for n in names if n.endswith(SUFFIX) and n != "adapter_model.safetensors"]
    if len(indices) == 1:
        return directory / indices[0]
    if len(files) == 1 and not indices:
        return directory / files[0]
    pickled = [n for n in names if n.endswith(PICKLED)]
    if pickled and not files:
        raise _pickled_error(directory / pickled[0])
    raise BadInputError(
        directory,
        expected=f"{SINGLE} or {INDEX}",
        found=f"{len(files)} other .safetensors files" if files else "no weights",
        remedy="name the weight file itself" if files else "is this a model's folder?",
    )


def _read_index(index: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Read a shard index as {shard's file name: its tensors' names}, and its metadata."""
    content = strict_json.loads(read_file(index, MAX_INDEX_BYTES), os.fspath(index))
    content = content if isinstance(content, dict) else {}
    weight_map, metadata = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise BadInputError(
            index, expected="a weight_map of tensor names to shard files", found="none"
        )
    shards: dict[str, list[str]] = {}
    bad: set[str] = set()
    for tensor, file in weight_map.items():
        if isinstance(file, str) and "/" not in file and file.endswith(SUFFIX):
            shards.setdefault(file, []).append(tensor)
        else:
            bad.add(repr(file))
    if len(shards) > MAX_SHARDS:
        most = f"an index of at most {MAX_SHARDS:,} shards"
        raise BadInputError(index, expected=most, found=f"{len(shards):,}")
    bad.update(repr(file) for file in shards if not is_plain_path(file))
    if bad:
        raise BadInputError(
            index,
            expected=f"shards named by plain file names that end in {SUFFIX}",
            found=min(bad),
            remedy="the index is damaged or hostile: download it again",
            offenders=sorted(bad),
        )
    absent = sorted(shards.keys() - set(_list_folder(index.parent)))
    if absent:
        raise BadInputError(
            index,
            expected=f"the {len(shards)} shards that it names",
            found=f"{len(absent)} missing",
            remedy="download the checkpoint again",
            offenders=absent,
        )
    return shards, metadata


def _pickled_error(path: Path) -> BadInputError:
    """Make the error for a checkpoint that only pickle could read."""
    return BadInputError(
        path,
        expected="safetensors weights",
        found="a pickled checkpoint, which can run code when it is loaded",
        remedy="get the model's safetensors files, or convert it where you trust it",
    )
