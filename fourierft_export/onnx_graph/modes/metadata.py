"""What a file says of the adapters in it, so that a session can feed it and `recover` read it.

The fields are in FORMAT.md. A graph holds an adapter's numbers, but not its fingerprints, its PEFT
config or the order of its tensors: so the metadata has the JSON header of the bundle's file, and
for each tensor of that file its place in the graph, or its bytes where the graph lacks it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import __version__
from ...bundle.bundle import Bundle
from ...files.safetensors_reader import decode_header_length, parse_header
from ...types import Array
from ..adapter_interface import KEY
from ..mode_names import BANK, DEFAULTS, MERGED, UNMERGED
from .mode_records import Plan, Written

if TYPE_CHECKING:
    import onnx_ir as ir

SCHEMA = 1
SPECTRUM = "fourierft.spectrum."
# Tensors that the graph does not hold go into the metadata, up to this size in all.
MAX_INLINE_BYTES = 1 << 24
MAX_BASE_BYTES = 1 << 18  # of a saved tensor of the base


def write_metadata(plan: Plan, mode: str, written: Written) -> None:
    """Describe the adapters in the metadata of the graph and of its expander."""
    adapters = plan.adapters if plan.defaults == DEFAULTS[0] else {}
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "mode": mode,
        "weights": {
            layer: [
                {"initializer": name, "transposed": transposed}
                | ({} if start is None else {"start": start})
                for name, transposed, start in held
            ]
            for layer, held in written.weights.items()
        },
    }
    if written.nodes:
        content["nodes"] = written.nodes
    if written.interface is not None:
        content["inputs"] = {**written.interface.to_dict(), "rows": list(adapters)}
        # Tools that optimise a graph drop the constants `fourierft.base.NAME`, which no node uses.
        content["base"] = {
            name: base64.b64encode(array.tobytes()).decode("ascii")
            for name, array in written.base.items()
            if array.nbytes <= MAX_BASE_BYTES and mode != BANK
        }
    given = {**plan.adapters, **plan.sources}
    for model in (plan.source.model, written.expander):
        if model is None:
            continue
        held = {} if mode == MERGED else _constants(model)
        content["adapters"] = {}
        for name, bundle in adapters.items():
            described = _describe(name, bundle, given[name], written.terms)
            record = _record(given[name], _spectra(content, name, described, held), held)
            content["adapters"][name] = described | ({"bundle": record} if record else {})
        # Unmerged, inputs have become constants.
        listed = {k: v for k, v in content.items() if k != "inputs" or mode != UNMERGED}
        text = json.dumps(listed, sort_keys=True, separators=(",", ":"), allow_nan=False)
        model.metadata_props[KEY] = text


def _describe(
    name: str, bundle: Bundle, given: Bundle, terms: Mapping[tuple[str, str], Mapping[str, str]]
) -> dict[str, Any]:
    return {
        "seed": bundle.spec.seed,
        "scaling": bundle.spec.scaling,
        "task_type": bundle.spec.task_type,
        "bundle_scaling": given.spec.scaling,
        "bundle_sha256": given.sha256,
        "saved": sorted(bundle.saved),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape or ()),
                "n_frequency": layer.n_frequency,
                "entry_rule": layer.entry_rule,
                "entries_sha256": layer.entries_sha256,
                "dtype": bundle.spectra[layer.name].dtype.name,
                **terms.get((layer.name, name), {}),
            }
            for layer in bundle.layers
        ],
    }


def _constants(model: ir.Model) -> dict[str, Array]:
    """The initializers that are in the file itself."""
    import onnx_ir as ir

    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {
        name: tensor.numpy()
        for name, tensor in tensors.items()
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor)
    }


def _spectra(
    content: Mapping[str, Any],
    adapter: str,
    described: Mapping[str, Any],
    held: Mapping[str, Array],
) -> dict[str, tuple[str, int, Array]]:
    """Return, by layer: the initializer with its spectrum, the offset there, and its values."""
    found = {
        layer["name"]: (layer["spectrum"], 0, held[layer["spectrum"]].reshape(-1))
        for layer in described["layers"]
        if layer.get("spectrum") in held
    }
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
    if bundle.spectra and not places:
        return None
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
