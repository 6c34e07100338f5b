"""An open ONNX model: its graph is in memory, and its external data stays on disk.

External tensors are read one at a time and by position: onnx-ir would map the file into memory, and
a file that shrinks under a memory map ends the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import BadInputError, first_line
from ...files.onnx_external_data import EXTERNAL, check_external_data, tensors
from ...files.safetensors_reader import open_regular, read_exactly
from ...types import Array
from .check_graph import find_faults
from .function_calls import list_calls
from .ops import free_name, register_constant, used_names

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

MAX_MODEL_BYTES = 2**31
STANDARD = ("", "ai.onnx")
_REPLACED = "\0replaced."  # no file can have this name


@dataclass(frozen=True, eq=False)
class Source:
    """An open ONNX model; its external tensors name their (checked) file by its absolute path.

    `replaced` makes the content of external tensors that are not on disk yet, by their location.
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
        """A tensor's values; only this one is read."""
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

    def read_constant(self, value: ir.Value) -> Array:
        """The content of a constant as an array."""
        return self.read(_tensor_of(value))

    def isolate_constant(self, value: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> ir.Value:
        """An initializer of the main graph that only `uses` consume: the constant or a copy."""
        graph, tensor = self.model.graph, _tensor_of(value)
        alone = len(uses) == len(value.uses()) and not value.is_graph_output()
        if alone and value.graph is graph and value.is_initializer():
            return value
        copy = register_constant(self.model, free_name(str(value.name), used_names(graph)), tensor)
        for node, index in uses:
            node.replace_input_with(index, copy)
        return copy

    def replace_constant(self, value: ir.Value, make: Callable[[], Array]) -> None:
        """Give a constant other content of its shape and dtype; external data at writing."""
        import onnx_ir as ir

        tensor, producer, name = _tensor_of(value), value.producer(), str(value.name)
        if isinstance(tensor, ir.ExternalTensor):
            new: ir.TensorProtocol = self.external_tensor(name, tensor, constant_shape(value), make)
        else:
            new = ir.tensor(np.ascontiguousarray(make()), name=name)
        if producer is None:
            value.const_value = new
        else:
            producer.attributes["value"] = ir.AttrTensor("value", new)
            value.const_value = None

    def external_tensor(
        self, name: str, like: ir.TensorProtocol, shape: Sequence[int], make: Callable[[], Array]
    ) -> ir.ExternalTensor:
        """An external tensor with the dtype of `like`, whose content is made when it is written."""
        import onnx_ir as ir

        location = f"{_REPLACED}{len(self.replaced)}"
        self.replaced[location] = make
        size = -(-math.prod(shape) * like.dtype.bitwidth // 8)
        return ir.ExternalTensor(location, 0, size, like.dtype, shape=ir.Shape(shape), name=name)


def open_onnx(path: str | os.PathLike[str], *, allow_links: bool = False) -> Source:
    """Open an ONNX file, without its external data; links that stay in its folder on request."""
    import onnx_ir as ir

    proto = read_proto(path)
    empty = [one.name for one in tensors(proto) if _has_no_data(one)]
    if empty:
        raise BadInputError(
            path,
            expected="a model with its weights",
            found=f"{len(empty)} tensors without data",
            remedy="get the model with its weights: this one was stripped of them",
            offenders=empty,
        )
    if faults := list(find_faults(proto)):
        more = len(faults) - 1
        raise BadInputError(
            path,
            expected="a valid ONNX model",
            found=faults[0] + (f", and {more} more faults" if more else ""),
            remedy="get or export the model again",
            offenders=[fault[:300] for fault in faults] if more else (),
        )
    files = check_external_data(proto, path, allow_links=allow_links)
    for tensor in tensors(proto):
        for entry in tensor.external_data if tensor.data_location == EXTERNAL else ():
            if entry.key == "location":
                entry.value = os.path.abspath(files[entry.value])
    try:
        model = ir.serde.deserialize_model(proto)
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            graph.sort()  # ONNX Runtime, too, reads nodes in any order
    except (ValueError, TypeError, KeyError, ir.serde.SerdeError) as error:
        raise BadInputError(path, expected="a valid ONNX model", found=first_line(error)) from None
    list_calls(model, path)  # ONNX Runtime, too, expands them
    if "" not in model.opset_imports and "ai.onnx" in model.opset_imports:  # its other name
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    return Source(Path(path), model, frozenset(files.values()))


def _has_no_data(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor has a shape, and neither numbers nor the name of a file with them."""
    absent = tensor.data_type == 0  # the empty sparse tensor of another kind of attribute
    if absent or tensor.data_location == EXTERNAL or 0 in tensor.dims or tensor.raw_data:
        return False
    return not any(field.name.endswith("_data") and value for field, value in tensor.ListFields())


def read_proto(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The message in an ONNX file, without its external data."""
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
    if not data:
        raise BadInputError(path, expected="an ONNX model", found="an empty file")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise BadInputError(path, expected="an ONNX model", found="something else") from None
    if not proto.HasField("graph") or not proto.opset_import:
        found = "a model without opset_import" if proto.HasField("graph") else "no graph in it"
        raise BadInputError(path, expected="an ONNX model", found=found)
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


def _tensor_of(value: ir.Value) -> ir.TensorProtocol:
    tensor = constant_of(value)
    if tensor is None:
        raise ValueError(f"{value.name} is no constant")
    return tensor


def constant_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant; () for a value that is none."""
    tensor = constant_of(value)
    return () if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
