"""Constants of an open graph replaced, and the result written, with bounded memory.

A constant that lies in the file itself is replaced at once. One that is external data is only
marked: its new content is made when its place in the new data file is reached, one at a time,
and what does not change is copied by the system from file to file.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import BadInputError, UsageError
from ...files.container import open_regular, read_exactly
from ...files.external import EXTERNAL, Range, tensors
from ...files.staging import check_output, os_errors_named, work_folder
from ...files.write import as_bytes, check_space
from ...types import Array, Progress
from .ops import free_name
from .source import Source, constant_of
from .write import check_data_output, data_path, publish_model

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Make = Callable[[], Array]

_MARK = "\0patch."  # no file can have this name
_CHUNK = 16 << 20
_LARGE, _PAGE, _SMALL = 1 << 20, 1 << 16, 64
_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


class Patch(NamedTuple):
    """New content of a constant.

    Attributes:
        make: gives it, in the constant's shape and dtype.
        name: of the constant.
        nbytes: its size.
    """

    make: Make
    name: str
    nbytes: int


class Edits:
    """Changes to the constants of one open graph, which is changed in place."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.patches: dict[str, Patch] = {}

    def own(self, value: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> ir.Value:
        """An initializer of the main graph with this constant, which only these uses see.

        The constant itself, if it is one already.
        """
        import onnx_ir as ir

        graph, tensor = self.source.model.graph, constant_of(value)
        alone = len(uses) == len(tuple(value.uses())) and not value.is_graph_output()
        if alone and value.graph is graph and value.is_initializer():
            return value
        if tensor is None:
            raise ValueError(f"{value.name} is no constant")
        taken = {str(one.name) for node in graph.all_nodes() for one in node.outputs}
        taken |= {str(one.name) for one in graph.inputs}
        taken |= {name for g in (graph, *graph.subgraphs()) for name in g.initializers}
        name = free_name(str(value.name), taken)
        copy = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(copy)
        for node, index in uses:
            node.replace_input_with(index, copy)
        # Before version 4 of the format every initializer had to be an input, too.
        self.source.model.ir_version = max(self.source.model.ir_version, 4)
        return copy

    def put(self, value: ir.Value, make: Make) -> None:
        """Give a constant another content of the same shape and dtype.

        Args:
            value: an initializer (also a subgraph's) or the output of a Constant node.
            make: gives the content; for external data, called when it is written.
        """
        import onnx_ir as ir

        tensor, name = constant_of(value), str(value.name)
        if tensor is None:
            raise ValueError(f"{name} is no constant")
        new = self._tensor(name, tensor, [int(size) for size in tensor.shape.numpy()], make)
        producer = value.producer()
        if producer is None:
            value.const_value = new
        else:
            producer.attributes["value"] = ir.AttrTensor("value", new)
            value.const_value = None

    def new(self, name: str, like: ir.TensorProtocol, shape: Sequence[int], make: Make) -> ir.Value:
        """A new initializer of the main graph, external data where `like` is.

        Args:
            name: it gets a number if it is taken.
            like: a tensor of the same dtype.
            shape: of the content.
            make: gives it.
        """
        import onnx_ir as ir

        graph = self.source.model.graph
        tensor = self._tensor(free_name(name, graph.initializers), like, shape, make)
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        self.source.model.ir_version = max(self.source.model.ir_version, 4)
        return value

    def _tensor(
        self, name: str, like: ir.TensorProtocol, shape: Sequence[int], make: Make
    ) -> ir.TensorProtocol:
        import onnx_ir as ir

        if not isinstance(like, ir.ExternalTensor):
            return ir.tensor(np.ascontiguousarray(make()), name=name)
        mark = f"{_MARK}{len(self.patches)}"
        nbytes = math.prod(shape) * like.dtype.numpy().itemsize
        self.patches[mark] = Patch(make, name, nbytes)
        self.source.made[mark] = make
        return ir.ExternalTensor(mark, 0, nbytes, like.dtype, shape=ir.Shape(shape), name=name)

    def write(
        self, out: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
    ) -> tuple[Path, ...]:
        """Write the graph; it is absent or complete at any moment.

        Args:
            out: the file to make; external data goes to `out` + ".data".
            force: replace existing files.
            progress: called with ("copy", bytes done, bytes in all).

        Returns:
            The files written: the model, and its data if it has any.

        Raises:
            UsageError: the output exists, without `force`.
            BadInputError: the input's data ends early.
            FileAccessError: the output cannot be written.
        """
        import onnx_ir as ir

        target = check_output(out, force=force)
        proto = ir.serde.serialize_model(self.source.model)
        external = [one for one in tensors(proto) if one.data_location == EXTERNAL]
        if proto.ByteSize() >= 2**31:
            raise UsageError(
                target, expected="a model below protobuf's 2 GiB", found=f"{proto.ByteSize():,}"
            )
        if external:
            check_data_output(target, force=force)
        with work_folder(target) as folder, os_errors_named(target, folder):
            staged = folder / target.name
            if external:
                self._write_data(external, data_path(staged), progress)
            staged.write_bytes(proto.SerializeToString())
            _check(staged, self.source.path)
            return publish_model(staged, target)

    def _write_data(
        self, external: Sequence[onnx.TensorProto], path: Path, progress: Progress | None
    ) -> None:
        """Place every external tensor in one new file, and say so in its message."""
        places: dict[tuple[str, int], tuple[int, int]] = {}
        work: list[tuple[int, Range | Patch]] = []
        end = 0
        for tensor in external:
            keys = {entry.key: entry.value for entry in tensor.external_data}
            key = keys["location"], int(keys.get("offset", 0))
            if key not in places:
                part = self.patches.get(key[0]) or self.source.ranges[key]
                size = part.nbytes if isinstance(part, Patch) else part.length
                step = _PAGE if size >= _LARGE else _SMALL
                start = -(-end // step) * step
                places[key] = start, size
                work.append((start, part))
                end = start + size
            start, size = places[key]
            length = int(keys["length"]) if "length" in keys else size
            del tensor.external_data[:]
            for name, value in (("location", path.name), ("offset", start), ("length", length)):
                tensor.external_data.add(key=name, value=str(value))
        check_space(path.parent, end)
        # One thread writes while this one makes the next content: two of them in memory at most.
        with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
            pending: Future[None] | None = None
            for start, part in work:
                if progress:
                    progress("copy", start, end)
                data = as_bytes(part.make()) if isinstance(part, Patch) else None
                if pending is not None:
                    pending.result()
                pending = writer.submit(_put, file.fileno(), start, part, data)
            if pending is not None:
                pending.result()


def _put(fd: int, start: int, part: Range | Patch, data: memoryview | None) -> None:
    if data is not None:
        _write_at(fd, start, data)
    elif isinstance(part, Range):
        _copy(part, fd, start)


def _write_at(fd: int, start: int, view: memoryview) -> None:
    os.lseek(fd, start, os.SEEK_SET)
    while len(view):
        view = view[os.write(fd, view) :]


def _copy(part: Range, out: int, start: int) -> None:
    """Bytes from file to file; the system does it where it can, without a way through memory."""
    source = open_regular(part.file)
    try:
        done = _system_copy(source, part, out, start)
        while done < part.length:
            size = min(_CHUNK, part.length - done)
            at = part.offset + done
            data = read_exactly(source, at, at + size, part.file)
            _write_at(out, start + done, memoryview(data))
            done += size
    finally:
        os.close(source)


def _system_copy(source: int, part: Range, out: int, start: int) -> int:
    """The number of bytes that `copy_file_range` copied: all, or fewer where it cannot."""
    copy: Any = getattr(os, "copy_file_range", None)
    done = 0
    while copy is not None and done < part.length:
        try:
            step = copy(source, out, part.length - done, part.offset + done, start + done)
        except OSError as error:
            if error.errno in _NO_COPY:
                return done
            raise
        if not step:
            return done
        done += step
    return done


def _check(staged: Path, source: Path) -> None:
    """onnx.checker on the output; what it finds in the input, too, is the input's own business."""
    import onnx

    try:
        onnx.checker.check_model(os.fspath(staged))
    except onnx.checker.ValidationError as error:
        try:
            onnx.checker.check_model(os.fspath(source))
        except onnx.checker.ValidationError:
            return
        raise BadInputError(
            source, expected="a graph that can be edited", found=str(error).splitlines()[0]
        ) from None
