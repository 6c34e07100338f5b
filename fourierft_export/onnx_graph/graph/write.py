"""Writes an ONNX model, checked, and its external data: complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BadInputError, UsageError
from ...files.hashed_write import check_space, name_os_errors, set_umask_mode, sync
from ...files.onnx_external_data import EXTERNAL, count_tensor_bytes, tensors
from ...files.staging import check_output, open_work_folder
from ...types import Progress
from ..mode_names import expander_path
from .source import Source

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# A protobuf message ends at 2 GiB; the graph itself needs some room.
_MAX_EMBEDDED = 2**31 - 2**26
# Bytes. Two tensors are made and written at a time, larger ones one by one: 2 GiB of weights of
# 64 MiB, half of them merged, take 360 MiB of memory (one thread: 231 MiB, 1.2 times the time).
_IN_FLIGHT = 128 << 20
_PAGE, _SMALL = 4096, 64


def data_path(path: Path) -> Path:
    """The file with the external data of the model `path`."""
    return path.with_name(f"{path.name}.data")


def write_model(
    graph: ir.Model | Source,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write a graph, checked by onnx.checker; it is absent or complete at any moment.

    Args:
        graph: external data of a `Source` stays external, and is made or copied piece by piece.
        path: the file to make; external data goes to `path` + ".data".
        external_data: True puts the other weights there, too, False never does; by default they
            go there when the model would pass protobuf's 2 GiB.
        force: replace existing files.
        progress: called with ("copy", bytes done, bytes in all) of external data.
    """
    import onnx_ir as ir

    source = graph if isinstance(graph, Source) else Source(Path(path), graph)
    values = [v for v in source.model.graph.initializers.values() if v.const_value is not None]
    inside = [v for v in values if not isinstance(v.const_value, ir.ExternalTensor)]
    if external_data is None:
        external_data = sum(v.const_value.nbytes for v in inside if v.const_value) > _MAX_EMBEDDED
    kept = {v: v.const_value for v in inside}
    try:
        for value, tensor in kept.items() if external_data else ():
            if tensor and tensor.nbytes > _SMALL and tensor.dtype != ir.DataType.STRING:
                value.const_value = source.external_tensor(
                    str(value.name), tensor, tensor.shape.numpy(), tensor.numpy
                )
        proto = ir.serde.serialize_model(source.model)
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor
    external = [one for one in tensors(proto) if one.data_location == EXTERNAL]
    if proto.ByteSize() >= 2**31:
        raise UsageError(
            path, expected="a model below protobuf's 2 GiB", found=f"{proto.ByteSize():,} bytes"
        )
    out = check_output(path, force=force)
    if external:
        # Data that a run left which was killed before its model came is no obstacle.
        check_output(data_path(out), force=force or _is_left_over(out))
    with open_work_folder(out) as folder, name_os_errors(out, folder):
        staged = folder / out.name
        if external:
            _write_data(source, external, data_path(staged), progress)
        staged.write_bytes(proto.SerializeToString())
        _check(staged, source.path)
        return _publish(staged, out)


def write_pair(
    graph: ir.Model | Source,
    expander: ir.Model | None,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write a graph as `write_model` does, and the expander of mode paired: both, or neither."""
    if expander is None:
        return write_model(graph, path, external_data=external_data, force=force, progress=progress)
    out = check_output(expander_path(path), force=force)
    with open_work_folder(out) as folder:
        staged, *data = write_model(expander, folder / out.name, external_data=external_data)
        if data:
            check_output(data_path(out), force=force)
        files = write_pair(
            graph, None, path, external_data=external_data, force=force, progress=progress
        )
        return (*files, *_publish(staged, out))


def _write_data(
    source: Source,
    external: Sequence[onnx.TensorProto],
    path: Path,
    progress: Progress | None,
) -> None:
    """Write external tensors to one new file, and its offsets into their messages."""
    from onnx_ir import external_data

    parts: dict[tuple[str, int, int], Any] = {}
    keys = []
    for tensor in external:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        key = entries["location"], int(entries.get("offset", 0)), count_tensor_bytes(tensor)
        keys.append(key)
        if key not in parts:
            parts[key] = _part(source, tensor, *key)
    total, done = sum(length for _, _, length in parts), 0

    def report(tensor: ir.TensorProtocol, _: object) -> None:
        nonlocal done
        if progress:
            progress("copy", done, total)
        done += tensor.nbytes

    check_space(path.parent, total)
    placed = external_data.convert_tensors_to_external(
        list(parts.values()),
        path.parent,
        path.name,
        callback=report,
        max_workers=2,
        max_in_flight_bytes=_IN_FLIGHT,
        alignment=_PAGE,
        align_threshold=_SMALL,
    )
    offsets = {key: there.offset for key, there in zip(parts, placed, strict=True)}
    for tensor, key in zip(external, keys, strict=True):
        del tensor.external_data[:]
        where = {"location": path.name, "offset": offsets[key], "length": key[2]}
        for name, value in where.items():
            tensor.external_data.add(key=name, value=str(value))


def _part(
    source: Source, tensor: onnx.TensorProto, location: str, offset: int, length: int
) -> ir.TensorProtocol:
    """The content of an external tensor, for onnx-ir's writer."""
    import onnx_ir as ir

    dtype, shape = ir.DataType(tensor.data_type), ir.Shape(tensor.dims)
    make = source.replaced.get(location)
    if make is not None:
        return ir.LazyTensor(lambda: ir.tensor(make(), dtype=dtype), dtype, shape, name=tensor.name)

    class Stored(ir.ExternalTensor):
        def tofile(self, file: Any) -> None:
            try:
                super().tofile(file)
            except OSError as error:
                if error.errno is not None:  # of the system
                    raise
                raise BadInputError(
                    location,
                    expected=f"{length} bytes from byte {offset} on",
                    found="a file that ends earlier",
                    remedy="the file is truncated or changed while it was read: get it again",
                ) from error

    return Stored(location, offset, length, dtype, shape=shape, name=tensor.name)


def _check(staged: Path, source: Path) -> None:
    """Run onnx.checker on the output; errors that the input has, too, are ignored."""
    import onnx

    try:
        onnx.checker.check_model(os.fspath(staged))
    except onnx.checker.ValidationError as error:
        with contextlib.suppress(onnx.checker.ValidationError):
            if source.exists():
                onnx.checker.check_model(os.fspath(source))
            raise BadInputError(
                source, expected="a graph that can be edited", found=str(error).splitlines()[0]
            ) from None


def refuse_inputs(path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse outputs that would replace the inputs they are made from, even with `force`."""
    for output in (Path(path), data_path(Path(path))):
        check_output(output, force=True, inputs=tuple(inputs))


def _is_left_over(out: Path) -> bool:
    """Whether a killed run has moved the data to its place, and not the model (`_publish`)."""
    staged = [folder / out.name for folder in out.parent.glob(f"{escape(out.name)}.partial-*")]
    halves = [one for one in staged if one.exists() and not data_path(one).exists()]
    return bool(halves) and not os.path.lexists(out)


def _publish(staged: Path, out: Path) -> tuple[Path, ...]:
    """Move model and data to their place.

    An old model is deleted first and the new one moved last: a model never meets other data.
    """
    staged_data, data = data_path(staged), data_path(out)
    has_data, replaces = staged_data.exists(), os.path.lexists(out)
    for file in (staged, staged_data) if has_data else (staged,):
        set_umask_mode(file)
        sync(file)
    if has_data:
        out.unlink(missing_ok=True)
        os.replace(staged_data, data)
    os.replace(staged, out)
    if replaces and not has_data:
        data.unlink(missing_ok=True)
    sync(out.parent)
    return (out, data) if has_data else (out,)
