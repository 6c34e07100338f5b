"""ONNX Runtime sessions: loaded without its warnings, with errors of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInputError, UsageError, first_line, missing_extra
from ...types import Array

_FATAL_ONLY = 4  # ONNX Runtime's log severity: its errors, with names from the file, are raised
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
# On x86-64 without VNNI, ONNX Runtime multiplies 8-bit activations by signed 8-bit weights with
# 16-bit sums that saturate: 27 times the error with dynamic int8, 3 with QDQ. "1" avoids that.
_EXACT_INT8 = "session.x64quantprecision"


def onnxruntime_for(what: str) -> Any:
    """Import onnxruntime, or raise a MissingExtraError that says that `what` needs it."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise missing_extra("onnxruntime", "ort", what) from None
    return onnxruntime


def to_value(array: Array, device: str = "cpu", number: int = 0) -> Any:
    """Make an OrtValue; on the CPU it shares the array's memory, which must outlive it."""
    make = onnxruntime_for("ONNX Runtime values").OrtValue
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return make.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return make.ortvalue_from_numpy(array, device, number)


def session_options(options: Any = None) -> Any:
    """The user's SessionOptions, with exact int8 sums where they do not say otherwise."""
    if options is None:
        options = onnxruntime_for("AdapterSession").SessionOptions()
    try:
        options.get_session_config_entry(_EXACT_INT8)
    except RuntimeError:  # there is none
        options.add_session_config_entry(_EXACT_INT8, "1")
    return options


def load_session(path: Path, providers: Sequence[Any], options: Any) -> Any:
    """An InferenceSession, without ONNX Runtime's warnings at every overridable input."""
    ort = onnxruntime_for("AdapterSession")
    options = session_options(options)
    severity = options.log_severity_level
    options.log_severity_level = max(severity, _FATAL_ONLY)
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=list(providers))
    except _runtime_errors() as error:
        raise BadInputError(
            path, expected="a model that ONNX Runtime loads", found=first_line(error)
        ) from error
    finally:
        options.log_severity_level = severity


def run_session(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, Any], options: Any, path: Path
) -> list[Any]:
    """The outputs of a run, as ONNX Runtime's values.

    Raises:
        UsageError: inputs of another dtype, rank or size than the model's.
        BadInputError: anything else that ONNX Runtime fails at.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    # ValueError: an input that is not fed
    failures: tuple[type[Exception], ...] = (ValueError, *_runtime_errors())
    try:
        return list(session.run_with_ort_values(list(outputs), dict(feeds), options))
    except state.InvalidArgument as error:
        raise UsageError(
            "inputs", expected="what the model takes", found=first_line(error)
        ) from error
    except failures as error:
        raise BadInputError(
            path,
            expected="a model that runs on these inputs",
            found=first_line(error),
            remedy="check that the sizes of the inputs go together",
        ) from error


def device_of(
    providers: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> tuple[str, int]:
    """The device for the inputs of a session: ("cuda", number) or ("cpu", 0)."""
    first = providers[0]
    if first != "CUDAExecutionProvider":
        return "cpu", 0
    return "cuda", int(options.get(first, {}).get("device_id", 0))


def _runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a model that it cannot load or run: no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "EPFail Fail InvalidArgument InvalidGraph InvalidProtobuf NoModel NoSuchFile "
        "NotImplemented RuntimeException"
    )
    return (RuntimeError, *(getattr(state, name) for name in names.split() if hasattr(state, name)))
