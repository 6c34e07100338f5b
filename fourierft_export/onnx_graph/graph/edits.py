"""Constants of an open graph replaced. What is external data is made only when it is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...types import Array, Progress
from .ops import free_name, register_constant, used_names
from .source import Source, constant_of, constant_shape
from .write import write_model

if TYPE_CHECKING:
    import onnx_ir as ir

Make = Callable[[], Array]


class Edits:
    """Changes to the constants of one open graph, which is changed in place."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def own(self, value: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> ir.Value:
        """An initializer of the main graph with this constant, which only these uses see.

        The constant itself, if it is one already.
        """
        graph, tensor = self.source.model.graph, constant_of(value)
        alone = len(uses) == len(value.uses()) and not value.is_graph_output()
        if alone and value.graph is graph and value.is_initializer():
            return value
        if tensor is None:
            raise ValueError(f"{value.name} is no constant")
        name = free_name(str(value.name), used_names(graph))
        copy = register_constant(self.source.model, name, tensor)
        for node, index in uses:
            node.replace_input_with(index, copy)
        return copy

    def put(self, value: ir.Value, make: Make) -> None:
        """Give a constant another content of the same shape and dtype.

        Args:
            value: an initializer (also a subgraph's) or the output of a Constant node.
            make: gives the content; for external data, called when it is written.
        """
        import onnx_ir as ir

        tensor, producer = constant_of(value), value.producer()
        if tensor is None:
            raise ValueError(f"{value.name} is no constant")
        new = self._tensor(str(value.name), tensor, constant_shape(value), make)
        if producer is None:
            value.const_value = new
        else:
            producer.attributes["value"] = ir.AttrTensor("value", new)
            value.const_value = None

    def new(self, name: str, like: ir.TensorProtocol, shape: Sequence[int], make: Make) -> ir.Value:
        """A new initializer of the main graph with the dtype of `like`, external data where it is.

        Its name gets a number if it is taken.
        """
        name = free_name(name, self.source.model.graph.initializers)
        return register_constant(self.source.model, name, self._tensor(name, like, shape, make))

    def write(
        self, out: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
    ) -> tuple[Path, ...]:
        """Write the graph: see `write_model`."""
        return write_model(self.source, out, force=force, progress=progress)

    def _tensor(
        self, name: str, like: ir.TensorProtocol, shape: Sequence[int], make: Make
    ) -> ir.TensorProtocol:
        import onnx_ir as ir

        if isinstance(like, ir.ExternalTensor):
            return self.source.replacement(name, like, shape, make)
        return ir.tensor(np.ascontiguousarray(make()), name=name)
