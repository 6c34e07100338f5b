"""Bundles back out of the ONNX files that hold them: unmerged, swappable, bank, expander.

A graph holds an adapter's numbers, but not its fingerprints, its PEFT config or the order of its
tensors. So an export writes the rest of the bundle's file into the metadata: its header as it was,
and for each tensor the place in the graph, or the bytes themselves. What comes back is checked by
the hash that the bundle states: it is the same file, or an error.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from ..bundle import names
from ..bundle.file import Bundle
from ..errors import BadInputError, UsageError
from ..files import dtypes, strict_json
from ..files.container import TensorInfo, parse_header
from ..onnx_graph.graph.source import Source, constant_of, open_onnx
from ..onnx_graph.metadata import KEY
from ..types import Array

if TYPE_CHECKING:
    pass

SPECTRUM = "fourierft.spectrum."
_SPEC = "fourierft"
# What is not in the graph goes into the metadata up to this size; else it cannot come back.
MAX_INLINE = 1 << 24


def recover_onnx(path: str | os.PathLike[str], *, allow_links: bool = False) -> dict[str, Bundle]:
    """The bundles that an ONNX file holds, bit for bit as they were exported or applied.

    Args:
        path: a file of mode unmerged, swappable or bank, or the expander of mode paired.
        allow_links: as in `apply_onnx`.

    Returns:
        Adapter name -> bundle.

    Raises:
        UsageError: a file without adapters, or with merged ones.
        BadInputError: not an ONNX model, or an adapter that is not as it was exported.
        FileAccessError: missing or unreadable.
    """
    source = open_onnx(path, allow_links=allow_links)
    text = source.model.metadata_props.get(KEY)
    if text is None:
        raise UsageError(
            path,
            expected="an ONNX file that this package wrote",
            found="no adapter in its metadata",
        )
    content = strict_json.loads(text.encode("utf-8"), os.fspath(path))
    bundles: dict[str, Bundle] = {}
    missing = []
    try:
        for name, adapter in content["adapters"].items():
            if "bundle" in adapter:
                data = _file(source, adapter["bundle"], name)
                bundles[name] = Bundle.from_bytes(data, f"{os.fspath(path)}: adapter {name}")
            else:
                missing.append(name)
        mode = content["mode"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, binascii.Error) as error:
        raise BadInputError(
            path,
            expected="an adapter as this package writes it",
            found=f"metadata that does not fit the graph ({type(error).__name__}: {error})",
        ) from None
    if missing or not bundles:
        raise UsageError(
            path,
            expected="a file that holds its adapters' spectra",
            found=f"mode {mode}, which does not" if missing else "no adapter",
            remedy="in mode paired they are in FILE.expand.onnx" if mode == "paired" else "",
        )
    return bundles


def _file(source: Source, record: Mapping[str, Any], name: str) -> bytes:
    """The bytes of a bundle's file, put together again; ValueError where something is missing."""
    text: bytes = record["header"].encode("utf-8")
    table = strict_json.loads(text, f"adapter {name}")
    sizes = [one["data_offsets"][1] for key, one in table.items() if key != "__metadata__"]
    size = 8 + len(text) + max(sizes)
    header = parse_header(text, size, f"adapter {name}")
    groups = json.loads(header.metadata[_SPEC])["groups"]
    pieces = []
    for key, info in header.tensors.items():
        if key.startswith(SPECTRUM):
            layers = names.expand(groups[int(key[len(SPECTRUM) :])]["layers"], info.shape[0])
            dtype = dtypes.to_numpy(info.dtype)
            count = info.shape[1]
            rows = [_spectrum(source, record["spectra"][one], count, dtype) for one in layers]
            piece = b"".join(rows)
        else:
            piece = _tensor(source, record["tensors"][key], info)
        if len(piece) != prod(info.shape) * dtypes.to_numpy(info.dtype).itemsize:
            raise ValueError(f"{key} has another size")
        pieces.append((info.start, piece))
    body = b"".join(piece for _, piece in sorted(pieces))
    return len(text).to_bytes(8, "little") + text + body


def _spectrum(source: Source, place: Mapping[str, Any], count: int, dtype: Any) -> bytes:
    array = _constant(source, place)
    if "row" in place:
        array = array[place["row"]][place["start"] :]
    return bytes(array[:count].astype(dtype).tobytes())


def _tensor(source: Source, place: Mapping[str, Any], info: TensorInfo) -> bytes:
    if "data" in place:
        return base64.b64decode(place["data"], validate=True)
    array = _constant(source, place)
    if place.get("turned"):
        array = array.T
    return bytes(array.astype(dtypes.to_numpy(info.dtype)).tobytes())


def _constant(source: Source, place: Mapping[str, Any]) -> Array:
    value = source.model.graph.initializers[place["initializer"]]
    tensor = constant_of(value)
    if tensor is None:
        raise ValueError(f"{value.name} has no content")
    array = source.read(tensor)
    return array[place["adapter"]] if "adapter" in place else array
