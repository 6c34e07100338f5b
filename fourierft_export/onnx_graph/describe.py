"""Describes ONNX files, and adapter files for them, for the verb `inspect`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from .adapter_interface import KEY
from .graph.source import read_proto

if TYPE_CHECKING:
    import onnx


def describe_onnx(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe what an ONNX file holds, as JSON values; external data is not read.

    Raises:
        FileAccessError: missing or unreadable.
        BadInputError: not an ONNX model.
    """
    model = read_proto(path)
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    return {
        "kind": "onnx",
        "path": os.fspath(path),
        "bytes": os.stat(path).st_size,
        "external_data": sorted(_external_files(graph)),
        "ir_version": model.ir_version,
        "opset": next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None),
        "producer": model.producer_name,
        "nodes": len(graph.node),
        "functions": sorted(f"{f.domain}::{f.name}" for f in model.functions),
        "initializers": len(graph.initializer),
        "inputs": [_value(v) for v in graph.input if v.name not in constants],
        "inputs_with_default": [_value(v) for v in graph.input if v.name in constants],
        "outputs": [_value(v) for v in graph.output],
        "adapter": _adapter(model),
    }


def describe_adapter_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe what an `.onnx_adapter` file feeds a graph, as JSON values."""
    from .runtime.adapter_file import read_adapter

    return {
        "kind": "onnx-adapter",
        "path": os.fspath(path),
        "inputs": [
            {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
            for name, array in sorted(read_adapter(path).items())
        ],
        "bytes": os.stat(path).st_size,
    }


def _external_files(graph: onnx.GraphProto) -> set[str]:
    """Names of the files that hold initializers."""
    return {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    return {
        "name": value.name,
        "dtype": names.get(tensor.elem_type, f"unknown type {tensor.elem_type}").lower(),
        "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim],
    }


def _adapter(model: onnx.ModelProto) -> dict[str, Any] | None:
    """The adapters in this package's metadata; None for a file without."""
    text = next((p.value for p in model.metadata_props if p.key == KEY), None)
    if text is None:
        return None
    try:
        content = json.loads(text)
        return {
            "mode": content["mode"],
            "adapters": [
                {
                    "name": name,
                    "seed": adapter["seed"],
                    "scaling": adapter["scaling"],
                    "layers": len(adapter["layers"]),
                    "bundle_sha256": adapter["bundle_sha256"],
                }
                for name, adapter in content["adapters"].items()
            ],
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
