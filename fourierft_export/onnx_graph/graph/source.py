"""An ONNX file that others made, opened: its graph in memory, its weights where they lie.

Only the graph is loaded. Weights that are external data stay on disk until they are asked for, one
at a time, by positional reads: a memory map would crash the process if the file shrank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import BadInputError
from ...files.container import open_regular, read_exactly
from ...files.external import Range, external_ranges
from ...types import Array

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_MODEL_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class Source:
    """An open ONNX model.

    Attributes:
        path: the file.
        model: its graph, as onnx_ir has it; external tensors are references.
        ranges: (location, offset) of external data -> where that is.
        made: locations of data that is not on disk yet -> what makes it (`edits`).
    """

    path: Path
    model: ir.Model
    ranges: dict[tuple[str, int], Range]
    made: dict[str, Callable[[], Array]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.model.opset_imports.get("", self.model.opset_imports.get("ai.onnx", 1))

    def range_of(self, tensor: ir.TensorProtocol) -> Range | None:
        """Where an external tensor lies; None for one that is in the graph."""
        import onnx_ir as ir

        if not isinstance(tensor, ir.ExternalTensor):
            return None
        found = self.ranges[str(tensor.location), tensor.offset or 0]
        return found._replace(length=tensor.nbytes)

    def read(self, tensor: ir.TensorProtocol) -> Array:
        """A tensor's values; only this one is read.

        Raises:
            BadInputError: its data ends early.
        """
        if getattr(tensor, "location", None) in self.made:
            return self.made[str(tensor.location)]()  # type: ignore[attr-defined]
        where = self.range_of(tensor)
        if where is None:
            return tensor.numpy()
        fd = open_regular(where.file)
        try:
            data = read_exactly(fd, where.offset, where.offset + where.length, where.file)
        finally:
            os.close(fd)
        shape = tensor.shape.numpy()
        if tensor.dtype.name in ("INT4", "UINT4"):  # two in a byte, the low one first
            packed = np.frombuffer(data, np.uint8)
            both = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)
            return both[: math.prod(shape)].view(tensor.dtype.numpy()).reshape(shape)
        dtype = tensor.dtype.numpy().newbyteorder("<")
        return np.frombuffer(data, dtype).reshape(shape)

    def picker(self, tensor: ir.TensorProtocol) -> Callable[[Array, Array], Array]:
        """A function that gives a few values of a matrix, without reading all of an external one.

        Args:
            tensor: two-dimensional.

        Returns:
            From rows and columns, int64 (k,), to their values (k,).
        """
        where = self.range_of(tensor)
        if where is None:
            matrix = tensor.numpy()  # once: each call copies it out of the message
            return lambda rows, columns: np.asarray(matrix[rows, columns])
        dtype = tensor.dtype.numpy().newbyteorder("<")
        width = int(tensor.shape.numpy()[1])

        def pick(rows: Array, columns: Array) -> Array:
            fd = open_regular(where.file)
            try:
                starts = [where.offset + int(p) * dtype.itemsize for p in rows * width + columns]
                pieces = [read_exactly(fd, s, s + dtype.itemsize, where.file) for s in starts]
            finally:
                os.close(fd)
            return np.frombuffer(b"".join(pieces), dtype)

        return pick


def open_onnx(path: str | os.PathLike[str], *, allow_links: bool = False) -> Source:
    """Open an ONNX file; no weight is read that is not in the file itself.

    Args:
        path: an .onnx file.
        allow_links: follow links of external data that end inside the model's folder.

    Raises:
        FileAccessError: missing or unreadable, or its external data is.
        BadInputError: not an ONNX model, or external data that must not be read.
    """
    import onnx
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_MODEL_BYTES:
            raise BadInputError(path, expected="a model of at most 2 GiB", found=f"{size:,} bytes")
        data = read_exactly(fd, 0, size, path)
    finally:
        os.close(fd)
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise BadInputError(path, expected="an ONNX model", found="something else") from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise BadInputError(path, expected="an ONNX model", found="a message without a graph")
    ranges = external_ranges(proto, path, allow_links=allow_links)
    try:
        model = ir.serde.deserialize_model(proto)
    except (ValueError, TypeError, KeyError, ir.serde.SerdeError) as error:
        raise BadInputError(
            path, expected="a valid ONNX model", found=(str(error).splitlines() or [""])[0]
        ) from None
    return Source(Path(path), model, ranges)


def constants(model: ir.Model) -> Iterator[ir.Value]:
    """Every constant of the main graph and its subgraphs: initializers and Constant nodes."""
    import onnx_ir as ir

    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (v for v in graph.initializers.values() if v.const_value is not None)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            value = node.outputs[0]
            tensor = constant_of(value)
            if tensor is not None:
                yield value


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output; None if it is neither."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or "value" not in node.attributes:
        return None
    return node.attributes["value"].as_tensor()
