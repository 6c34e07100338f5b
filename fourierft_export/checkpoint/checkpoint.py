"""A safetensors checkpoint of one file or many, read one tensor at a time.

Reads are by position, never through a memory map: a mapped file that shrinks takes the process
with it (SIGBUS), a short read is an error that can be told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import BadInputError, FileAccessError
from . import strict_json
from .container import TensorInfo, open_regular, read_exactly, read_file, read_header
from .dtypes import to_numpy
from .links import checked_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BLOCK = 8 << 20
MAX_INDEX_BYTES = 256 << 20

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint.

    Attributes:
        path: the file.
        tensors: what it holds, in the order of the payloads.
        metadata: its `__metadata__`.
        size: its length in bytes.
    """

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

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_links: bool = False) -> Checkpoint:
        """Open a Hugging Face folder (one file or sharded) or a single .safetensors file.

        Reads every header, no payload.

        Args:
            path: the folder or the file.
            allow_links: follow links between files of the folder (`links.checked_file`).

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
        file = checked_file(_weights_file(path), path, allow_links=allow_links)
        if file.name.endswith(SUFFIX):
            return cls._open_files(path, {file: None})
        listed, metadata = _read_index(file)
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
                raise _pickled(file)
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
        """Where the tensor `name` lies.

        Raises:
            BadInputError: the checkpoint has no such tensor.
        """
        if name not in self.tensors:
            raise BadInputError(f"{self.path}, tensor {name!r}", expected="to be there")
        return self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        """One tensor as a read-only array of its own dtype (bfloat16 as `ml_dtypes.bfloat16`).

        Raises:
            BadInputError: no such tensor; a dtype that numpy cannot hold; the file changed since
                it was opened.
        """
        info = self.info(name)
        try:
            dtype = to_numpy(info.dtype)
        except KeyError:
            raise BadInputError(
                f"{info.path}, tensor {name!r}",
                expected="a dtype with whole bytes per element",
                found=info.dtype,
            ) from None
        data = b"".join(self.blocks(name, max(info.nbytes, 1)))
        return np.frombuffer(data, dtype=dtype).reshape(info.shape)

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[bytes]:
        """The bytes of one tensor in pieces of at most `size`, whatever its dtype.

        Raises:
            BadInputError: no such tensor; the file changed since it was opened.
        """
        info = self.info(name)
        yield from self._span(_path_of(info), info.start, info.stop, size)

    def file_blocks(self, shard: Path, size: int = BLOCK) -> Iterator[bytes]:
        """The bytes of a whole shard in pieces of at most `size`.

        Raises:
            BadInputError: the file changed since it was opened.
        """
        yield from self._span(shard, 0, self._stamps[shard][2], size)

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


def _weights_file(directory: Path) -> Path:
    """The file a folder's weights begin at: as transformers chooses, else the only candidate."""
    for name in (SINGLE, INDEX):
        if os.path.lexists(directory / name):
            return directory / name
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise FileAccessError(
            directory, expected="a readable folder", found=error.strerror or str(error)
        ) from None
    indices = [n for n in names if n.endswith(f"{SUFFIX}.index.json")]
    files = [n for n in names if n.endswith(SUFFIX) and n != "adapter_model.safetensors"]
    if len(indices) == 1:
        return directory / indices[0]
    if len(files) == 1 and not indices:
        return directory / files[0]
    pickled = [n for n in names if n.endswith(PICKLED)]
    if pickled and not files:
        raise _pickled(directory / pickled[0])
    raise BadInputError(
        directory,
        expected=f"{SINGLE} or {INDEX}",
        found=f"{len(files)} other .safetensors files" if files else "no weights",
        remedy="name the weight file itself" if files else "is this a model's folder?",
    )


def _read_index(index: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
    """A shard index as {shard's file name: its tensors' names}, and its metadata."""
    content = strict_json.loads(read_file(index, MAX_INDEX_BYTES), os.fspath(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise BadInputError(
            index, expected="a weight_map of tensor names to shard files", found="none"
        )
    bad = sorted({repr(f) for f in weight_map.values() if not _is_plain_name(f)})
    if bad:
        raise BadInputError(
            index,
            expected=f"shards named by plain file names that end in {SUFFIX}",
            found=bad[0],
            remedy="the index is damaged or hostile: download it again",
            offenders=bad,
        )
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, []).append(name)
    return {file: tuple(names) for file, names in shards.items()}, metadata


def _is_plain_name(name: object) -> bool:
    """Whether `name` is a file name and nothing else, on every system."""
    return (
        isinstance(name, str)
        and name.endswith(SUFFIX)
        and name == PurePosixPath(name).name == PureWindowsPath(name).name
        and name.isprintable()
    )


def _pickled(path: Path) -> BadInputError:
    return BadInputError(
        path,
        expected="safetensors weights",
        found="a pickled checkpoint, which can run code when it is loaded",
        remedy="get the model's safetensors files, or convert it where you trust it",
    )


def _path_of(info: TensorInfo) -> Path:
    if info.path is None:
        raise BadInputError(f"tensor {info.name!r}", expected="a tensor that lies in a file")
    return info.path


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _stamp_of(file: Path) -> _Stamp:
    fd = open_regular(file)
    try:
        return _stamp(os.fstat(fd))
    finally:
        os.close(fd)
