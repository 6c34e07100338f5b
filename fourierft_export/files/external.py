"""External data of ONNX files: where a tensor's bytes lie, checked before any file is opened.

A model that somebody else made names files. ONNX's own loader refuses links, ONNX Runtime follows
them, so the names are checked before either of them opens the model (ONNX spec:
docs/ExternalData.md).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadInputError, FileAccessError
from .links import check_link, find_cache_repository, is_plain_path

EXTERNAL = 1  # onnx.TensorProto.EXTERNAL
_KEYS = frozenset({"location", "offset", "length", "checksum"})
_MAX_DIGITS = 19
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64,
         14: 64, 15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2,
         26: 2}  # fmt: skip


class Range(NamedTuple):
    """Where a tensor's bytes lie in an existing regular file that may be read."""

    file: Path
    offset: int
    length: int


def check_external_ranges(
    model: Any, path: str | os.PathLike[str], *, allow_links: bool = False
) -> dict[tuple[str, int], Range]:
    """Check every external tensor of a model, and say where its bytes are.

    Args:
        model: an onnx.ModelProto, loaded from `path` without external data.
        path: the model's file.
        allow_links: follow links that end inside the model's folder (those of a Hugging Face
            cache repository are always followed).

    Returns:
        (location, offset in bytes) -> range.

    Raises:
        BadInputError: listing every tensor whose location or range is wrong.
        FileAccessError: a file that is missing or cannot be read.
    """
    folder = Path(path).parent
    files: dict[str, Path | str] = {}
    ranges: dict[tuple[str, int], Range] = {}
    offenders = []
    for tensor in tensors(model):
        if tensor.data_location != EXTERNAL:
            continue
        try:
            location, found = _range(tensor, folder, files, allow_links)
            ranges[location, found.offset] = max(
                found, ranges.get((location, found.offset), found), key=lambda one: one.length
            )
        except ValueError as error:
            offenders.append(f"tensor {tensor.name!r}: {error}")
    if offenders:
        more = len(offenders) - 1
        raise BadInputError(
            path,
            expected="external data in files of the model's own folder",
            found=offenders[0] + (f", and {more} more" if more else ""),
            remedy="get the model from a source that you trust, with its data files",
            offenders=offenders if more else (),
        )
    return ranges


def find_external_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Find the real files with the external data of an ONNX file; none for any other file."""
    if not os.fspath(path).endswith(".onnx") or not os.path.isfile(path):
        return ()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
        ranges = check_external_ranges(model, path, allow_links=True)
    except (BadInputError, FileAccessError, DecodeError, ValueError, OSError):
        return ()  # the function that reads the model will raise the error
    return tuple({Path(os.path.realpath(one.file)) for one in ranges.values()})


def tensors(model: Any) -> Iterator[Any]:
    """Yield every TensorProto of a model: of its graph, subgraphs, attributes and functions."""
    waiting = [model.graph, *model.functions, *(one.algorithm for one in model.training_info)]
    waiting += [one.initialization for one in model.training_info]
    while waiting:
        graph = waiting.pop()
        yield from getattr(graph, "initializer", ())
        sparse = list(getattr(graph, "sparse_initializer", ()))
        for attribute in (a for node in graph.node for a in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
            waiting += [attribute.g] if attribute.HasField("g") else []
            waiting += attribute.graphs
        for one in sparse:
            yield from (one.values, one.indices)


def _range(
    tensor: Any, folder: Path, files: dict[str, Path | str], allow_links: bool
) -> tuple[str, Range]:
    """Return the tensor's location and range; ValueError says what is wrong with it."""
    keys: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS:
            raise ValueError(f"unknown key {entry.key[:40]!r}")
        if entry.key in keys:
            raise ValueError(f"{entry.key} given twice")
        keys[entry.key] = entry.value
    location = keys.get("location", "")
    if location not in files:
        files[location] = _file(location, folder, allow_links)
    file = files[location]
    if isinstance(file, str):
        raise ValueError(file)
    size, needed = file.stat().st_size, count_tensor_bytes(tensor)
    offset = _number(keys, "offset", 0)
    length = _number(keys, "length", needed)
    if length != needed:
        raise ValueError(f"{length} bytes stated, its shape needs {needed}")
    if offset + length > size:
        raise ValueError(f"bytes {offset} to {offset + length} of a file of {size}: {location!r}")
    return location, Range(file, offset, length)


def _number(keys: Mapping[str, str], name: str, default: int) -> int:
    text = keys.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise ValueError(f"{name} {text[:40]!r}")
    return int(text)


def count_tensor_bytes(tensor: Any) -> int:
    """Compute a TensorProto's size in bytes by its shape; ValueError if it cannot be external."""
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise ValueError(f"data type {tensor.data_type}, which cannot be external")
    sizes = [int(size) for size in tensor.dims]
    if min(sizes, default=0) < 0:
        raise ValueError(f"shape {sizes}")
    return (prod(sizes) * bits + 7) // 8


def _file(location: str, folder: Path, allow_links: bool) -> Path | str:
    """Return the file at `location`, or the reason why it must not be read."""
    if not is_plain_path(location):
        return f"location {location[:80]!r}, which is no plain path below the model's folder"
    file = folder / location
    try:
        check_link(file, folder, allow_links=allow_links)
        found = os.stat(file)
    except BadInputError as error:
        return f"{error.found}; {error.remedy}"
    except OSError as error:
        raise FileAccessError(
            file, expected="the model's external data", found=error.strerror or str(error)
        ) from None
    if not stat.S_ISREG(found.st_mode):
        return f"{location!r} is no regular file"
    if found.st_nlink > 1 and find_cache_repository(Path(os.path.realpath(folder))) is None:
        return f"{location!r} is a hard link: another name of that file lies elsewhere"
    return file
