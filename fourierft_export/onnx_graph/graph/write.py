"""An ONNX model to disk: checked, with its weights beside it where they must be, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ...files.staging import check_output, os_errors_named, set_umask_mode, sync, work_folder

if TYPE_CHECKING:
    import onnx_ir as ir

# A protobuf message ends at 2 GiB; the graph itself needs some room.
MAX_EMBEDDED_BYTES = 2**31 - 2**26
DATA_SUFFIX = ".data"


def data_path(path: Path) -> Path:
    """Where the external data of `path` lies."""
    return path.with_name(path.name + DATA_SUFFIX)


def weight_bytes(model: ir.Model) -> int:
    """Size of all initializers of the main graph."""
    constants = (value.const_value for value in model.graph.initializers.values())
    return sum(constant.nbytes for constant in constants if constant is not None)


def write_model(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    force: bool = False,
) -> tuple[Path, ...]:
    """Write `model`, checked by onnx.checker; it is absent or complete at any moment.

    Args:
        path: the file to make; external data goes to `path` + ".data".
        external_data: True puts the weights beside the model, False never does; by default they
            go there when the model would pass protobuf's 2 GiB.
        force: replace existing files.

    Returns:
        The files written: the model, and its data if it has any.

    Raises:
        UsageError: the output exists, without `force`.
        FileAccessError: it cannot be written.
        onnx.checker.ValidationError: the model is not valid ONNX.
    """
    import onnx
    import onnx_ir as ir

    out = check_output(path, force=force)
    beside = data_path(out)
    external = weight_bytes(model) > MAX_EMBEDDED_BYTES if external_data is None else external_data
    if external:
        check_data_output(out, force=force)
    with work_folder(out) as folder, os_errors_named(out, folder):
        staged = folder / out.name
        ir.save(model, staged, external_data=beside.name if external else None)
        onnx.checker.check_model(str(staged))
        return publish_model(staged, out)


def check_data_output(out: Path, *, force: bool) -> None:
    """Refuse external data that exists, unless a run left it that was killed before its model came.

    Raises:
        UsageError: it exists, without `force`.
    """
    check_output(data_path(out), force=force or _is_left_over(out))


def refuse_inputs(path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse a model, or data beside it, that would replace what it is made of, even by force.

    Raises:
        UsageError: one of them is an input, or holds one.
    """
    for output in (Path(path), data_path(Path(path))):
        check_output(output, force=True, inputs=tuple(inputs))


def _is_left_over(out: Path) -> bool:
    """Whether a killed run has moved the data to its place, and not the model (`publish_model`)."""
    staged = [folder / out.name for folder in out.parent.glob(f"{escape(out.name)}.partial-*")]
    halves = [one for one in staged if one.exists() and not data_path(one).exists()]
    return bool(halves) and not os.path.lexists(out)


def publish_model(staged: Path, out: Path) -> tuple[Path, ...]:
    """Move model and data to their place.

    The model goes last, and an old one goes away first: a model never meets another's data.
    """
    staged_data, beside = data_path(staged), data_path(out)
    for file in (staged, staged_data):
        if file.exists():
            set_umask_mode(file)
            sync(file)
    files: tuple[Path, ...] = (out,)
    replaces = os.path.lexists(out)
    if staged_data.exists():
        out.unlink(missing_ok=True)
        os.replace(staged_data, beside)
        files = (out, beside)
    os.replace(staged, out)
    if replaces and len(files) == 1:
        beside.unlink(missing_ok=True)
    sync(out.parent)
    return files
