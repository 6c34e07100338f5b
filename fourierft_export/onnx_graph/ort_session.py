"""ONNX Runtime sessions: loaded without its warnings, with errors of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from .adapter_file import runtime

_ERRORS_ONLY = 3  # ONNX Runtime's log severity


def load_session(path: Path, providers: Sequence[Any], options: Any) -> Any:
    """An InferenceSession, without ONNX Runtime's warnings at every overridable input.

    Args:
        path: the model.
        providers: as onnxruntime.InferenceSession takes them.
        options: an onnxruntime.SessionOptions, left as it was; or None.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BadInputError: ONNX Runtime cannot load the model.
    """
    ort = runtime("AdapterSession")
    if options is None:
        options = ort.SessionOptions()
    with _quiet(options):
        try:
            return ort.InferenceSession(os.fspath(path), options, providers=list(providers))
        except load_errors() as error:
            raise BadInputError(
                path,
                expected="a model that ONNX Runtime loads",
                found=str(error).splitlines()[0] if str(error) else repr(error),
            ) from error


def load_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a model that it cannot load; it has no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "EPFail Fail InvalidArgument InvalidGraph InvalidProtobuf NoModel NoSuchFile "
        "NotImplemented RuntimeException"
    )
    return (RuntimeError, *(getattr(state, name) for name in names.split() if hasattr(state, name)))


def device_of(
    providers: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> tuple[str, int]:
    """Where a session wants its inputs: ("cuda", number of the device) or ("cpu", 0).

    Args:
        providers, options: as the session's get_providers and get_provider_options give them.
    """
    first = providers[0]
    if first != "CUDAExecutionProvider":
        return "cpu", 0
    return "cuda", int(options.get(first, {}).get("device_id", 0))


@contextmanager
def _quiet(options: Any) -> Iterator[None]:
    """Only errors within the block."""
    level = options.log_severity_level
    options.log_severity_level = max(level, _ERRORS_ONLY)
    try:
        yield
    finally:
        options.log_severity_level = level
