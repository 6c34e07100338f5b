"""What a graph's metadata must tell, so that the bundles in it come back bit for bit (`recover`).

A graph holds an adapter's numbers, but not its fingerprints, its PEFT config or the order of its
tensors. So an export writes the rest of the bundle's file into the metadata: its header as it was,
and for each tensor the place in the graph, or the bytes themselves.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.file import Bundle
from ...files.container import header_length, parse_header
from ...types import Array
from ..graph.source import constant_of, constants
from ..locate.consumers import same_module
from ..metadata import KEY

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
    from ...spectral.entries import spectral_entries

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
