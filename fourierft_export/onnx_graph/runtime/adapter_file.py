"""`.onnx_adapter` files: an adapter's inputs for one graph, in ONNX Runtime's own format.

Any program with ONNX Runtime can load one and name it in its run options; the graph must have the
inputs, and the file knows nothing of the base: that is checked where it is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInputError, missing_extra
from ...files.container import open_regular
from ...files.staging import staged_file
from ...types import Array

SUFFIX = ".onnx_adapter"
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def write_adapter(
    path: str | os.PathLike[str], parameters: Mapping[str, Array], *, force: bool = False
) -> Path:
    """Write an adapter's inputs; the file is absent or complete.

    Args:
        path: ends in `.onnx_adapter` by custom.
        parameters: input name -> array.
        force: replace an existing file.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: the file exists, without `force`.
        FileAccessError: it cannot be written.
    """
    ort = runtime("writing an .onnx_adapter file")
    values = {name: to_value(array) for name, array in parameters.items()}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    with staged_file(path, force=force) as partial:
        adapter.export_adapter(os.fspath(partial))
    return Path(path)


def write_inputs(
    path: str | os.PathLike[str], parameters: Mapping[str, Array], *, force: bool = False
) -> Path:
    """Write an adapter's inputs as a plain safetensors file, which any language can read.

    Args and errors: as in `write_adapter`; onnxruntime is not needed.
    """
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in parameters.items()}
    with staged_file(path, force=force) as partial:
        partial.write_bytes(save(arrays))
    return Path(path)


def read_adapter(path: str | os.PathLike[str]) -> dict[str, Array]:
    """The inputs in an `.onnx_adapter` file, copied out of it.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        FileAccessError: missing or unreadable.
        BadInputError: not such a file.
    """
    ort = runtime("reading an .onnx_adapter file")
    os.close(open_regular(path))
    try:
        adapter = ort.AdapterFormat.read_adapter(os.fspath(path))
        values = adapter.get_parameters()
        return {name: np.array(value.numpy(), copy=True) for name, value in values.items()}
    except RuntimeError as error:
        raise BadInputError(
            path,
            expected="an ONNX Runtime adapter",
            found="a file that ONNX Runtime cannot read as one",
        ) from error


def to_value(array: Array, device: str = "cpu", number: int = 0) -> Any:
    """An OrtValue; on the CPU it shares the array's memory, which must live as long."""
    ort = runtime("ONNX Runtime values")
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        bits = array.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array, device, number)


def runtime(what: str) -> Any:
    """The module onnxruntime; MissingExtraError if it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise missing_extra("onnxruntime", "ort", what) from None
    return onnxruntime
