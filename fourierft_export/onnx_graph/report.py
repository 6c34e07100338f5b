"""What an export made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..types import html_table

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class ExportReport:
    """An ONNX file as it was written.

    Attributes:
        path: the model.
        data: the file with its external data, or None.
        bytes: size of all files together.
        mode: one of `modes.MODES`.
        opset: of the standard operators.
        nodes: number of nodes in the main graph.
        inputs: what every run must be fed: name -> shape; symbolic sizes by name. Inputs with a
            default, as adapters mostly are, are left out.
        outputs: name -> shape.
        layers: module paths of the adapted layers.
        adapters: names of the adapters in it.
        notes: what the user should know, one line each.
    """

    path: str
    data: str | None
    bytes: int
    mode: str
    opset: int
    nodes: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    layers: tuple[str, ...]
    adapters: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists and dictionaries, for JSON."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def _repr_html_(self) -> str:
        names = ("path", "mode", "opset", "nodes", "bytes")
        facts = {name: getattr(self, name) for name in names}
        facts |= {"layers": len(self.layers), "adapters": ", ".join(self.adapters)}
        inputs = (("input", name, shape) for name, shape in self.inputs.items())
        outputs = (("output", name, shape) for name, shape in self.outputs.items())
        return html_table("ONNX file", facts, [*inputs, *outputs])


def report_on(
    files: Sequence[Path],
    model: ir.Model,
    mode: str,
    layers: tuple[str, ...],
    adapters: tuple[str, ...],
    notes: tuple[str, ...],
) -> ExportReport:
    """The report on a model that was written to `files`, itself first."""
    data = next((str(file) for file in files[1:] if file.suffix == ".data"), None)
    graph = model.graph
    inputs, outputs = (
        {
            str(value.name): tuple(d if isinstance(d, int) else str(d) for d in value.shape or ())
            for value in values
        }
        for values in ([v for v in graph.inputs if v.name not in graph.initializers], graph.outputs)
    )
    size, opset = sum(file.stat().st_size for file in files), model.opset_imports[""]
    return ExportReport(
        str(files[0]), data, size, mode, opset, len(graph), inputs, outputs, layers, adapters, notes
    )
