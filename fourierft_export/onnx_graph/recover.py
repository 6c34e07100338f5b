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

import numpy as np

from ..bundle import names
from ..bundle.file import Bundle
from ..checkpoint import dtypes, strict_json
from ..checkpoint.container import TensorInfo, header_length, parse_header
from ..errors import BadInputError, UsageError
from .consumers import same_module
from .metadata import KEY
from .source import Array, Source, constant_of, constants, open_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

SPECTRUM = "fourierft.spectrum."
_SPEC = "fourierft"
# What is not in the graph goes into the metadata up to this size; else it cannot come back.
MAX_INLINE = 1 << 24


def remember(model: ir.Model, sources: Mapping[str, Bundle], *, inputs: bool = True) -> None:
    """Write into a graph's metadata what `recover_onnx` needs; merged graphs are left alone.

    Args:
        model: complete, with the metadata of `metadata.describe`; changed in place.
        sources: adapter name -> the bundle that shall come back.
        inputs: whether the adapter inputs of the metadata are inputs; else they are constants, and
            the metadata does not tell of them any more.
    """
    content = json.loads(model.metadata_props[KEY])
    held = _held(model)
    for name, adapter in content["adapters"].items():
        if name not in sources:
            continue
        spectra = _spectra(content, name, sources[name], model)
        if spectra is not None:
            rest = _rest(sources[name], held)
            if rest is not None:
                adapter["bundle"] = {"spectra": spectra, **rest}
    if not inputs:
        content.pop("inputs", None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    model.metadata_props[KEY] = text


def _held(model: ir.Model) -> list[tuple[str, ir.TensorProtocol]]:
    """Constants that lie in the file itself."""
    import onnx_ir as ir

    found = []
    for value in constants(model):
        tensor = constant_of(value)
        if (
            tensor is not None
            and not isinstance(tensor, ir.ExternalTensor)
            and value.is_initializer()
        ):
            found.append((str(value.name), tensor))
    return found


def _spectra(
    content: Mapping[str, Any], adapter: str, bundle: Bundle, model: ir.Model
) -> dict[str, Any] | None:
    """Layer of the bundle -> where its spectrum is; None if one is not in the graph."""
    layers = {layer["name"]: layer for layer in content["adapters"][adapter]["layers"]}
    inputs = content.get("inputs", {"groups": [], "rows": []})
    rows = {
        layer: (group, row)
        for group in inputs["groups"]
        for row, layer in enumerate(group["layers"])
    }
    initializers = model.graph.initializers
    found: dict[str, Any] = {}
    for spec in bundle.layers:
        there = [name for name in layers if same_module(name, spec.name)]
        layer = spec.name if spec.name in layers else there[0] if len(there) == 1 else None
        if layer is None:
            return None
        if "spectrum" in layers[layer]:
            found[spec.name] = {"initializer": layers[layer]["spectrum"]}
        elif layer in rows and rows[layer][0]["spectrum"] in initializers:
            group, row = rows[layer]
            entries = constant_of(initializers[group["entries"]])
            if entries is None:
                return None
            every = entries.numpy()
            place: dict[str, Any] = {"initializer": group["spectrum"], "row": row}
            if every.ndim == 3:
                place["adapter"] = inputs["rows"].index(adapter)
                every = every[place["adapter"]]
            start = _start(every, _own_entries(bundle, spec.name, layers[layer]))
            if start is None:
                return None
            found[spec.name] = place | {"start": start}
        else:
            return None
    return found


def _own_entries(bundle: Bundle, name: str, layer: Mapping[str, Any]) -> Array:
    from ..spectral.entries import spectral_entries

    if name in bundle.explicit_entries:
        return bundle.explicit_entries[name]
    rows, columns = layer["shape"]
    seed = bundle.spec.entry_seed
    return spectral_entries(seed, (rows, columns), layer["n_frequency"], layer["entry_rule"])


def _start(entries: Array, own: Array) -> int | None:
    """Where a layer's own entries begin among those of its group."""
    for start in np.flatnonzero((entries == own[0]).all(axis=1)):
        if np.array_equal(entries[start : start + len(own)], own):
            return int(start)
    return None


def _rest(bundle: Bundle, held: list[tuple[str, ir.TensorProtocol]]) -> dict[str, Any] | None:
    """The bundle's header, and its other tensors; None if they are too large to be written."""
    data = bundle.to_bytes()
    length = header_length(data[:8], len(data), "bundle")
    header = parse_header(data[8 : 8 + length], len(data), "bundle")
    tensors: dict[str, Any] = {}
    inline = 0
    for name, info in header.tensors.items():
        if name.startswith(SPECTRUM):
            continue
        array = bundle.saved.get(name)
        place = None if array is None else _place(array, name, held)
        if place is None:
            payload = data[info.start : info.stop]
            inline += len(payload)
            place = {"data": base64.b64encode(payload).decode("ascii")}
        tensors[name] = place
    if inline > MAX_INLINE:
        return None
    return {"header": data[8 : 8 + length].decode("utf-8"), "tensors": tensors}


def _place(
    array: Array, name: str, held: list[tuple[str, ir.TensorProtocol]]
) -> dict[str, Any] | None:
    """Where the graph holds a saved tensor with these very bytes."""
    for constant, tensor in sorted(held, key=lambda one: one[0] != name):
        if tensor.nbytes < array.nbytes or tensor.dtype.numpy() != array.dtype:
            continue
        shape = tuple(int(size) for size in tensor.shape.numpy())
        if shape == array.shape and tensor.numpy().tobytes() == array.tobytes():
            return {"initializer": constant}
        turned = len(shape) == 2 and shape == array.shape[::-1]
        if turned and tensor.numpy().T.tobytes() == array.tobytes():
            return {"initializer": constant, "turned": True}
        if shape[1:] == array.shape and constant == name:  # a bank's table
            for row, one in enumerate(tensor.numpy()):
                if one.tobytes() == array.tobytes():
                    return {"initializer": constant, "adapter": row}
    return None


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
