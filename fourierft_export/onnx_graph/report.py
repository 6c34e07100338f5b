"""What an export made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExportReport:
    """An ONNX file as it was written.

    Attributes:
        path: the model.
        data: the external data beside it, or None.
        bytes: size of all files together.
        mode: "merged" or "unmerged".
        opset: of the standard operators.
        nodes: number of nodes in the main graph.
        inputs: name -> shape; symbolic sizes by name.
        outputs: the same.
        layers: module paths of the adapted layers.
        adapters: names of the adapters in it.
        losses: layer -> what quantising its merged weight again lost of the adapter's change
            (relative, Frobenius norm); empty where nothing was quantised again.
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
    losses: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists and dictionaries, for JSON."""
        return asdict(self) | {
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "outputs": {name: list(shape) for name, shape in self.outputs.items()},
            "layers": list(self.layers),
            "adapters": list(self.adapters),
            "notes": list(self.notes),
        }
