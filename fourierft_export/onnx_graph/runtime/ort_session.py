"""ONNX Runtime sessions: loaded without its warnings, with errors of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import BadInputError, UsageError
from .adapter_file import runtime

_ERRORS_ONLY = 3  # ONNX Runtime's log severity
# On x86-64 without VNNI, ONNX Runtime multiplies 8-bit activations by signed 8-bit weights with
# 16-bit sums that saturate: errors 25 times as large as quantisation's own. "1" turns that off.
_EXACT_INT8 = "session.x64quantprecision"


def session_options(options: Any = None) -> Any:
    """The SessionOptions of every session that this package makes.

    Args:
        options: the user's onnxruntime.SessionOptions. What it sets stays; "1" is added for
            `session.x64quantprecision` where it has no entry of that name.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    if options is None:
        options = runtime("AdapterSession").SessionOptions()
    try:
        options.get_session_config_entry(_EXACT_INT8)
    except RuntimeError:  # there is none
        options.add_session_config_entry(_EXACT_INT8, "1")
    return options


def load_session(path: Path, providers: Sequence[Any], options: Any) -> Any:
    """An InferenceSession, without ONNX Runtime's warnings at every overridable input.

    Args:
        path: the model.
        providers: as onnxruntime.InferenceSession takes them.
        options: an onnxruntime.SessionOptions, or None; see `session_options`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BadInputError: ONNX Runtime cannot load the model.
    """
    ort = runtime("AdapterSession")
    options = session_options(options)
    with _quiet(options):
        try:
            return ort.InferenceSession(os.fspath(path), options, providers=list(providers))
        except load_errors() as error:
            raise BadInputError(
                path,
                expected="a model that ONNX Runtime loads",
                found=_first_line(error),
            ) from error


def run_session(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, Any], options: Any, path: Path
) -> list[Any]:
    """The outputs of a run, as ONNX Runtime's values.

    Args:
        session: from `load_session`.
        outputs: names.
        feeds: input name -> OrtValue.
        options: an onnxruntime.RunOptions, or None.
        path: of the model, for messages.

    Raises:
        UsageError: inputs of another dtype, rank or size than the model's.
        BadInputError: anything else that ONNX Runtime fails at.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        return list(session.run_with_ort_values(list(outputs), dict(feeds), options))
    except state.InvalidArgument as error:
        raise UsageError(
            "inputs", expected="what the model takes", found=_first_line(error)
        ) from error
    except load_errors() as error:
        raise BadInputError(
            path,
            expected="a model that runs on these inputs",
            found=_first_line(error),
            remedy="check that the sizes of the inputs go together",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def load_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a model that it cannot load or run: no common base class."""
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
