"""Writes an ONNX model, checked, and its external data: complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BadInputError, UsageError, first_line
from ...files.hashed_write import check_space, name_os_errors
from ...files.onnx_external_data import EXTERNAL, count_tensor_bytes, tensors
from ...files.staging import (
    check_output,
    clean_leftovers,
    open_work_folder,
    publish_together,
)
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
_PLAN = "graph"  # one name for all runs: a second writer of an output of several files is refused


def data_path(path: Path) -> Path:
    """The file with the external data of the model `path`."""
    return path.with_name(f"{path.name}.data")


def write_model(
    graph: ir.Model | Source,
    path: str | os.PathLike[str],
    expander: ir.Model | None = None,
    *,
    external_data: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> tuple[Path, ...]:
    """Write a graph, checked by onnx.checker; all its files are there at any moment, or none.

    Args:
        graph: external data of a `Source` stays external, and is made or copied piece by piece.
        path: the file to make; external data goes to `path` + ".data".
        expander: the second graph of mode paired.
        external_data: True puts the other weights there, too, False never does; by default they
            go there when the model would pass protobuf's 2 GiB.
        force: replace existing files.
        progress: called with ("copy", bytes done, bytes in all) of external data.
        write_more: writes further files of the output to the folder that it is given.
    """
    out = check_output(path, force=force)
    models = {out: graph} if expander is None else {out: graph, expander_path(out): expander}
    with open_work_folder(out, plan=_PLAN) as folder, name_os_errors(out, folder):
        for target, model in models.items():
            check_output(target, force=force)
            report = progress if target == out else None
            _stage(model, folder / target.name, out.parent, external_data, force, report)
        if write_more:
            write_more(folder)
            for staged in folder.glob("[!.]*"):  # what other processes wrote meanwhile
                check_output(out.with_name(staged.name), force=force)
        replaced = [target for target in models if os.path.lexists(target)]
        files = publish_together(folder, out)
        for target in replaced:
            if data_path(target) not in files:
                data_path(target).unlink(missing_ok=True)
        return files


def _stage(
    graph: ir.Model | Source,
    staged: Path,
    directory: Path,
    external_data: bool | None,
    force: bool,
    progress: Progress | None,
) -> None:
    """Write a graph and its external data to a work folder; `directory` will hold them."""
    import onnx_ir as ir

    source = graph if isinstance(graph, Source) else Source(directory / staged.name, graph)
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
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # each level names the whole graph around it
            cause = cause.__cause__
        raise BadInputError(
            source.path, expected="an ONNX model that can be written again", found=first_line(cause)
        ) from error
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor
    if proto.ByteSize() >= 2**31:
        raise UsageError(
            directory / staged.name,
            expected="a model below protobuf's 2 GiB",
            found=f"{proto.ByteSize():,} bytes",
        )
    external = [one for one in tensors(proto) if one.data_location == EXTERNAL]
    if external:
        check_output(directory / data_path(staged).name, force=force)
        _write_data(source, external, data_path(staged), progress)
    staged.write_bytes(proto.SerializeToString())
    _check(staged, source.path)


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
                source, expected="a graph that can be edited", found=first_line(error)
            ) from None


def check_model_output(
    path: str | os.PathLike[str],
    *,
    paired: bool,
    force: bool,
    inputs: Iterable[object] = (),
) -> None:
    """Refuse outputs that exist without `force`, and any that would replace the inputs."""
    out = Path(path)
    targets = (out, expander_path(out)) if paired else (out,)
    if not os.path.lexists(out):
        clean_leftovers(out)
    for target in targets:
        check_output(target, force=force, inputs=inputs)
        check_output(data_path(target), force=True, inputs=inputs)
