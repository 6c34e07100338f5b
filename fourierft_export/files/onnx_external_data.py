"""External data of ONNX files: where a tensor's bytes lie, checked before any file is opened.

A model that somebody else made names files. ONNX's own loader refuses links, ONNX Runtime follows
them, so the names are checked before either of them opens the model (ONNX spec:
docs/ExternalData.md).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from ..errors import BadInputError, FileAccessError
from .safe_paths import check_link, find_cache_repository, is_plain_path

EXTERNAL = 1  # onnx.TensorProto.EXTERNAL
_KEYS = frozenset({"location", "offset", "length", "checksum"})
_MAX_DIGITS = 19


def check_external_data(
    model: Any, path: str | os.PathLike[str], *, allow_links: bool = False
) -> dict[str, Path]:
    """Check every external tensor of a model, and return the file at each location.

    Args:
        model: an onnx.ModelProto, loaded from `path` without external data.
        path: the model's file.
        allow_links: follow links that end inside the model's folder (those of a Hugging Face
            cache repository are always followed).
    """
    files: dict[str, Path | str] = {}
    offenders = []
    for tensor in tensors(model):
        if tensor.data_location == EXTERNAL:
            problem = _problem(tensor, Path(path).parent, files, allow_links)
            offenders += [f"tensor {tensor.name!r}: {problem}"] if problem else []
    if offenders:
        more = len(offenders) - 1
        raise BadInputError(
            path,
            expected="external data in files of the model's own folder",
            found=offenders[0] + (f", and {more} more" if more else ""),
            remedy="get the model from a source that you trust, with its data files",
            offenders=offenders if more else (),
        )
    return {location: file for location, file in files.items() if isinstance(file, Path)}


def find_external_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Find the real files with the external data of an ONNX file; none for any other file."""
    if not os.fspath(path).endswith(".onnx") or not os.path.isfile(path):
        return ()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
        files = check_external_data(model, path, allow_links=True)
    except (BadInputError, FileAccessError, DecodeError, ValueError, OSError):
        return ()  # the function that reads the model will raise the error
    return tuple({Path(os.path.realpath(file)) for file in files.values()})


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


def _problem(tensor: Any, folder: Path, files: dict[str, Path | str], allow_links: bool) -> str:
    """Return what is wrong with where a tensor lies, "" if nothing; adds its file to `files`."""
    keys: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS:
            return f"unknown key {entry.key[:40]!r}"
        if entry.key in keys:
            return f"{entry.key} given twice"
        keys[entry.key] = entry.value
    location = keys.get("location", "")
    if location not in files:
        files[location] = _file(location, folder, allow_links)
    file = files[location]
    if isinstance(file, str):
        return file
    for name in ("offset", "length"):
        text = keys.get(name, "0")
        if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
            return f"{name} {text[:40]!r}"
    try:
        needed = count_tensor_bytes(tensor)
    except ValueError as error:
        return str(error)
    size, offset = file.stat().st_size, int(keys.get("offset", 0))
    if int(keys.get("length", needed)) != needed:
        return f"{keys['length']} bytes stated, its shape needs {needed}"
    if offset + needed > size:
        return f"bytes {offset} to {offset + needed} of a file of {size}: {location!r}"
    return ""


def count_tensor_bytes(tensor: Any) -> int:
    """Compute a TensorProto's size in bytes by its shape; ValueError if it cannot be external."""
    import onnx_ir as ir

    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError):
        raise ValueError(f"data type {tensor.data_type}, which cannot be external") from None
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"shape {list(tensor.dims)}")
    return (prod(map(int, tensor.dims)) * int(bits) + 7) // 8


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
        why = error.strerror or str(error)
        raise FileAccessError(file, expected="the model's external data", found=why) from None
    if not stat.S_ISREG(found.st_mode):
        return f"{location!r} is no regular file"
    if found.st_nlink > 1 and find_cache_repository(Path(os.path.realpath(folder))) is None:
        return f"{location!r} is a hard link: another name of that file lies elsewhere"
    return file
