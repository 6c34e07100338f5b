"""Files with an adapter's inputs for one graph: ONNX Runtime's `.onnx_adapter`, or safetensors.

Any program with ONNX Runtime can load the first and name it in its run options. The file does not
identify the base: whether the adapter belongs to it is checked when the file is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ...errors import BadInputError
from ...files.safetensors_reader import open_regular
from ...files.staging import staged_file
from ...types import Array
from .ort_session import onnxruntime_for, to_value

SUFFIX = ".onnx_adapter"


def write_adapter(
    path: str | os.PathLike[str], parameters: Mapping[str, Array], *, force: bool = False
) -> None:
    """Write an adapter's inputs (name -> array) for ONNX Runtime; `force` replaces a file."""
    adapter = onnxruntime_for("writing an .onnx_adapter file").AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {name: to_value(array) for name, array in parameters.items()}
    adapter.set_parameters(values)
    with staged_file(path, force=force) as partial:
        adapter.export_adapter(os.fspath(partial))


def write_inputs(
    path: str | os.PathLike[str], parameters: Mapping[str, Array], *, force: bool = False
) -> None:
    """Write an adapter's inputs as a plain safetensors file, which any language can read."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in parameters.items()}
    with staged_file(path, force=force) as partial:
        partial.write_bytes(save(arrays))


def read_adapter(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the inputs (name -> array) in an `.onnx_adapter` file."""
    ort = onnxruntime_for("reading an .onnx_adapter file")
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
