"""`recover_onnx`: reads the bundles in an ONNX file of mode unmerged, swappable, paired or bank.

The export recorded in the metadata where each tensor of a bundle's file is in the graph
(`onnx_graph.modes.metadata`). The bundle's own hash proves that the same bytes come back.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from typing import Any

from ..bundle.bundle import Bundle
from ..errors import BadInputError, UsageError
from ..files import dtypes, strict_json
from ..files.safetensors_reader import parse_header
from ..onnx_graph.adapter_interface import KEY
from ..onnx_graph.graph.source import Source, open_onnx
from ..types import Array


def recover_onnx(path: str | os.PathLike[str], *, allow_links: bool = False) -> dict[str, Bundle]:
    """Reads the bundles that an ONNX file holds, bit for bit as they were exported or applied.

    Args:
        path: a file of mode unmerged, swappable or bank, or the expander of mode paired.
        allow_links: follow links from the model to data files in its own folder.

    Returns:
        Adapter name -> bundle.

    Raises:
        UsageError: a file without adapters, or with merged ones.
        BadInputError: not an ONNX model, an adapter that changed since it was exported, or a file
            that an older version of this package made.
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
    arrays: dict[str, Array] = {}
    bundles: dict[str, Bundle] = {}
    try:
        mode, adapters = content["mode"], content["adapters"]
        for name, adapter in adapters.items():
            if "bundle" in adapter:
                data = _read_bundle(source, adapter["bundle"], arrays)
                bundles[name] = Bundle.from_bytes(data, f"{os.fspath(path)}: adapter {name}")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInputError(
            path,
            expected="a bundle whose place is recorded in the metadata",
            found=f"metadata that does not fit the graph ({type(error).__name__}: {error})",
            remedy="the file was damaged or changed: export it again",
        ) from None
    if not bundles or len(bundles) < len(adapters):
        raise UsageError(
            path,
            expected="a file that holds its adapters' spectra",
            found=f"mode {mode}, which does not" if adapters else "no adapter",
            remedy="in mode paired they are in FILE.expand.onnx" if mode == "paired" else "",
        )
    return bundles


def _read_bundle(source: Source, record: Mapping[str, Any], arrays: dict[str, Array]) -> bytes:
    """Assemble the bytes of a bundle's file by its record; an error if it is damaged."""
    if record.keys() != {"header", "tensors"}:
        raise BadInputError(
            source.path,
            expected="a bundle in the layout of this version",
            found="one made by an older version of this package",
            remedy="export it again",
        )
    header: bytes = record["header"].encode("utf-8")
    table = strict_json.loads(header, "header of the bundle")
    size = max(entry["data_offsets"][1] for key, entry in table.items() if key != "__metadata__")
    pieces = []
    for key, info in parse_header(header, 8 + len(header) + size, "bundle").tensors.items():
        places = record["tensors"][key]
        rows = places if isinstance(places, list) else [places]
        dtype = dtypes.to_numpy(info.dtype)
        count = info.nbytes // dtype.itemsize // len(rows)
        piece = b"".join(_read_values(source, one, dtype, count, arrays) for one in rows)
        if len(piece) != info.nbytes:
            raise ValueError(f"{key} has another size")
        pieces.append(piece)
    return len(header).to_bytes(8, "little") + header + b"".join(pieces)


def _read_values(
    source: Source, place: Mapping[str, Any], dtype: Any, count: int, arrays: dict[str, Array]
) -> bytes:
    """Read `count` values of a tensor of the bundle's file from their place in the graph."""
    if "data" in place:
        return base64.b64decode(place["data"], validate=True)
    name, start = place["initializer"], place["offset"]
    if name not in arrays:
        tensor = source.model.graph.initializers[name].const_value
        if tensor is None:
            raise ValueError(f"{name} has no content")
        arrays[name] = source.read(tensor)
    array = arrays[name].T if place.get("transposed") else arrays[name]
    if type(start) is not int or not 0 <= start <= array.size - count:
        raise ValueError(f"{name} is too small")
    return bytes(array.reshape(-1)[start : start + count].astype(dtype).tobytes())
