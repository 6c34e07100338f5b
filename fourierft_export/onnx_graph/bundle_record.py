"""Records in a graph's metadata where its bundles are, so that `recover_onnx` gives them back.

A graph holds an adapter's numbers, but not its fingerprints, its PEFT config or the order of its
tensors. So the metadata of an adapter gets one record, "bundle", of the bundle's file: "header",
the file's own JSON header, and "tensors", for each tensor of the file its place: {"initializer":
name, "offset": elements, "transposed": bool} in the graph, or {"data": base64} where the graph does
not hold it. A stack of spectra has a list of places, one for each of its rows.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.file import Bundle
from ..files.container import decode_header_length, parse_header
from ..types import Array
from .metadata import KEY

if TYPE_CHECKING:
    import onnx_ir as ir

SPECTRUM = "fourierft.spectrum."
# Tensors that the graph does not hold go into the metadata, up to this size in all.
MAX_INLINE_BYTES = 1 << 24


def record_bundles(model: ir.Model, bundles: Mapping[str, Bundle], *, inputs: bool = True) -> None:
    """Record in a graph's metadata where its bundles are; those it does not hold are left out.

    Args:
        model: complete, with the metadata of `metadata.describe`; changed in place.
        bundles: adapter name -> the bundle that `recover_onnx` gives back.
        inputs: False where the adapter inputs of the metadata have become constants: the metadata
            then lists no inputs any more.
    """
    import onnx_ir as ir

    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    held = {
        name: tensor.numpy()
        for name, tensor in tensors.items()
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor)
    }
    content = json.loads(model.metadata_props[KEY])
    for name in content["adapters"].keys() & bundles.keys():
        record = _record(bundles[name], _spectra_of(content, name, held), held)
        if record is not None:
            content["adapters"][name]["bundle"] = record
    if not inputs:
        content.pop("inputs", None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    model.metadata_props[KEY] = text


def _spectra_of(
    content: Mapping[str, Any], adapter: str, held: Mapping[str, Array]
) -> dict[str, tuple[str, int, Array]]:
    """Return, by layer: the initializer with its spectrum, the offset there, and its values."""
    found = {}
    for layer in content["adapters"][adapter]["layers"]:
        if layer.get("spectrum") in held:
            found[layer["name"]] = (layer["spectrum"], 0, held[layer["spectrum"]].reshape(-1))
    inputs = content.get("inputs", {"groups": [], "rows": []})
    for group in inputs["groups"]:
        table = held.get(group["spectrum"])
        if table is None:
            continue
        first = inputs["rows"].index(adapter) * table.shape[-2] if table.ndim == 3 else 0
        rows = table.reshape(-1, table.shape[-1])[first : first + table.shape[-2]]
        for number, (layer, row) in enumerate(zip(group["layers"], rows, strict=True), first):
            found.setdefault(layer, (group["spectrum"], number * len(row), row))
    return found


def _record(
    bundle: Bundle, graph_spectra: Mapping[str, tuple[str, int, Array]], held: Mapping[str, Array]
) -> dict[str, Any] | None:
    """Make the record of one bundle; None if the graph lacks a spectrum, or it is too large."""
    places: dict[bytes, dict[str, Any]] = {}
    for name, spectrum in bundle.spectra.items():
        # Under the bundle's name for the layer, or the graph's, which may have another prefix.
        for row in (graph_spectra.get(name), *graph_spectra.values()):
            start = None if row is None else _find(row[2], spectrum)
            if row is not None and start is not None:
                places[np.ascontiguousarray(spectrum).tobytes()] = {
                    "initializer": row[0],
                    "offset": row[1] + start,
                }
                break
    data = bundle.to_bytes()
    length = 8 + decode_header_length(data[:8], len(data), "bundle")
    record: dict[str, Any] = {"header": data[8:length].decode("utf-8"), "tensors": {}}
    inline = 0
    for key, info in parse_header(data[8:length], len(data), "bundle").tensors.items():
        payload = data[info.start : info.stop]
        if key.startswith(SPECTRUM):
            size = len(payload) // info.shape[0]
            rows = [payload[at : at + size] for at in range(0, len(payload), size)]
            if not all(one in places for one in rows):
                return None
            record["tensors"][key] = [places[one] for one in rows]
            continue
        place = _place(bundle.saved[key], key, held) if key in bundle.saved else None
        if place is None:
            inline += len(payload)
            place = {"data": base64.b64encode(payload).decode("ascii")}
        record["tensors"][key] = place
    return record if inline <= MAX_INLINE_BYTES else None


def _find(values: Array, wanted: Array) -> int | None:
    """Find the position in `values` at which `wanted`, in the same dtype, begins."""
    text, part = values.tobytes(), wanted.astype(values.dtype).tobytes()
    at = text.find(part)
    while at >= 0 and at % values.itemsize:
        at = text.find(part, at + 1)
    return at // values.itemsize if at >= 0 else None


def _place(array: Array, name: str, held: Mapping[str, Array]) -> dict[str, Any] | None:
    """Find where the graph holds a saved tensor with these bytes; its own name is tried first."""
    for initializer in sorted(held, key=lambda one: one != name):
        there = held[initializer]
        if there.dtype != array.dtype:
            continue
        if there.shape == array.shape and there.tobytes() == array.tobytes():
            return {"initializer": initializer, "offset": 0}
        is_matrix = there.ndim == 2 and there.shape == array.shape[::-1]
        if is_matrix and there.T.tobytes() == array.tobytes():
            return {"initializer": initializer, "offset": 0, "transposed": True}
        if initializer == name and there.shape[1:] == array.shape:  # a bank's table
            for row, one in enumerate(there):
                if one.tobytes() == array.tobytes():
                    return {"initializer": initializer, "offset": row * array.size}
    return None
