"""An ONNX file that others made, opened: its graph in memory, its weights where they lie.

Only the graph is loaded. Weights that are external data stay on disk until they are read, one at a
time. They are read by position: onnx-ir would map the file into memory, and a file that shrinks
under a memory map ends the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import BadInputError
from ...files.container import open_regular, read_exactly
from ...files.external import EXTERNAL, external_ranges, tensors
from ...types import Array

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

MAX_MODEL_BYTES = 2**31
STANDARD = ("", "ai.onnx")
_REPLACED = "\0replaced."  # no file can have this name


@dataclass(frozen=True, eq=False)
class Source:
    """An open ONNX model.

    Attributes:
        path: the file.
        model: its graph; external tensors name their (checked) file by its absolute path.
        files: the files that hold external data.
        replaced: location of a tensor that is not on disk yet -> what makes its content (`Edits`).
    """

    path: Path
    model: ir.Model
    files: frozenset[Path] = frozenset()
    replaced: dict[str, Callable[[], Array]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.model.opset_imports.get("", self.model.opset_imports.get("ai.onnx", 1))

    def read(self, tensor: ir.TensorProtocol) -> Array:
        """A tensor's values; only this one is read.

        Raises:
            BadInputError: its data ends early.
        """
        import onnx_ir as ir

        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy()
        if tensor.location in self.replaced:
            return self.replaced[str(tensor.location)]()
        start, shape = tensor.offset or 0, tensor.shape.numpy()
        fd = open_regular(tensor.path)
        try:
            data = read_exactly(fd, start, start + tensor.nbytes, tensor.path)
        finally:
            os.close(fd)
        if tensor.dtype.name in ("INT4", "UINT4"):  # two in a byte, the low one first
            packed = np.frombuffer(data, np.uint8)
            both = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)
            return both[: math.prod(shape)].view(tensor.dtype.numpy()).reshape(shape)
        return np.frombuffer(data, tensor.dtype.numpy().newbyteorder("<")).reshape(shape)

    def replacement(
        self, name: str, like: ir.TensorProtocol, shape: Sequence[int], make: Callable[[], Array]
    ) -> ir.ExternalTensor:
        """An external tensor with the dtype of `like`, whose content is made when it is written."""
        import onnx_ir as ir

        location = f"{_REPLACED}{len(self.replaced)}"
        self.replaced[location] = make
        size = -(-math.prod(shape) * like.dtype.bitwidth // 8)
        return ir.ExternalTensor(location, 0, size, like.dtype, shape=ir.Shape(shape), name=name)


def open_onnx(path: str | os.PathLike[str], *, allow_links: bool = False) -> Source:
    """Open an ONNX file; no weight is read that is not in the file itself.

    Args:
        path: an .onnx file.
        allow_links: follow links of external data that end inside the model's folder.

    Raises:
        FileAccessError: missing or unreadable, or its external data is.
        BadInputError: not an ONNX model, or external data that must not be read.
    """
    import onnx_ir as ir

    proto = read_proto(path)
    ranges = external_ranges(proto, path, allow_links=allow_links)
    for tensor in tensors(proto):
        if tensor.data_location == EXTERNAL:
            keys = {entry.key: entry for entry in tensor.external_data}
            offset = int(keys["offset"].value) if "offset" in keys else 0
            file = ranges[keys["location"].value, offset].file
            keys["location"].value = os.path.abspath(file)
    try:
        model = ir.serde.deserialize_model(proto)
    except (ValueError, TypeError, KeyError, ir.serde.SerdeError) as error:
        raise BadInputError(
            path, expected="a valid ONNX model", found=(str(error).splitlines() or [""])[0]
        ) from None
    return Source(Path(path), model, frozenset(there.file for there in ranges.values()))


def read_proto(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The message in an ONNX file, without its external data.

    Raises:
        FileAccessError: missing or unreadable.
        BadInputError: not an ONNX model.
    """
    import onnx
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
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise BadInputError(path, expected="an ONNX model", found="something else") from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise BadInputError(path, expected="an ONNX model", found="a message without a graph")
    return proto


def constants(model: ir.Model) -> Iterator[ir.Value]:
    """Every constant of the main graph and its subgraphs: initializers and Constant nodes."""
    for graph in model.graphs():
        yield from (v for v in graph.initializers.values() if v.const_value is not None)
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and node.domain in STANDARD:
            value = node.outputs[0]
            if constant_of(value) is not None:
                yield value


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output; None if it is neither."""
    if value is None or value.const_value is not None:
        return None if value is None else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or "value" not in node.attributes:
        return None
    return node.attributes["value"].as_tensor()


def constant_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant; () for a value that is none."""
    tensor = constant_of(value)
    return () if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
