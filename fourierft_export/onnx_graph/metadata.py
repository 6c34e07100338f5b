"""What a file says of the adapters in it, so that a session can feed it and `recover` read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bundle.file import Bundle
from ..types import Array
from .interface import Interface

if TYPE_CHECKING:
    import onnx_ir as ir

KEY = "fourierft_export"
SCHEMA = 1


@dataclass(eq=False)
class Written:
    """What a mode wrote into a graph.

    Attributes:
        weights: layer -> (initializer or input that holds its weight, whether as (in, out), its
            first output there where mode paired takes several layers in one input) each.
        terms: (layer, adapter) -> names of its initializers "spectrum", "entries" and "scaling".
        changed: layer -> the values by which the adapters reach the rest of the graph.
        interface: the adapter inputs; None where there are none.
        base: the base's saved tensors, where they are inputs.
        expander: of mode paired.
    """

    weights: dict[str, list[tuple[str, bool, int | None]]] = field(default_factory=dict)
    terms: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    changed: dict[str, list[ir.Value]] = field(default_factory=dict)
    interface: Interface | None = None
    base: Mapping[str, Array] = field(default_factory=dict)
    expander: ir.Model | None = None

    def add(
        self,
        layer: str,
        weight: str,
        transposed: bool,
        changed: ir.Value | None,
        start: int | None = None,
    ) -> None:
        """Note where a layer's weight is, and the value that its adapter changed."""
        self.weights.setdefault(layer, []).append((weight, transposed, start))
        if changed is not None:
            self.changed.setdefault(layer, []).append(changed)


def describe(
    mode: str, adapters: Mapping[str, Bundle], sources: Mapping[str, Bundle], written: Written
) -> dict[str, str]:
    """The `metadata_props` of a model: one entry, `KEY`, a canonical JSON object.

    Args:
        mode: one of `mode_names.MODES`.
        adapters: adapter name -> the adapter in the model, scaled by its weight.
        sources: adapter name -> the bundle it came from, where there is one.
        written: what the mode wrote.

    Returns:
        {KEY: text} with "schema", "version", "mode"; "weights", per layer the initializers that
        hold its weight, whether as (in, out), and in a packed one of mode paired its "start";
        "adapters", per name "seed", "scaling" (a bundle's own times its weight), "bundle_scaling",
        "bundle_sha256", "task_type", "saved" (names of its dense tensors) and "layers": name,
        shape, n_frequency, entry_rule, entries_sha256, dtype of the spectrum, and unmerged the
        names of the initializers "spectrum", "entries", "scaling"; "inputs", the adapter inputs
        (`Interface.to_dict`), with "rows", the adapters' names in the order of a bank's table.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "mode": mode,
        "weights": {
            layer: [
                {"initializer": name, "transposed": transposed}
                | ({} if start is None else {"start": start})
                for name, transposed, start in held
            ]
            for layer, held in written.weights.items()
        },
        "adapters": {
            name: _adapter(name, bundle, sources.get(name, bundle), written.terms)
            for name, bundle in adapters.items()
        },
    }
    if written.interface is not None:
        content["inputs"] = {**written.interface.to_dict(), "rows": list(adapters)}
    return {KEY: json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)}


def _adapter(
    name: str,
    bundle: Bundle,
    source: Bundle,
    terms: Mapping[tuple[str, str], Mapping[str, str]],
) -> dict[str, Any]:
    return {
        "seed": bundle.spec.seed,
        "scaling": bundle.spec.scaling,
        "task_type": bundle.spec.task_type,
        "bundle_scaling": source.spec.scaling,
        "bundle_sha256": source.sha256,
        "saved": sorted(bundle.saved),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape or ()),
                "n_frequency": layer.n_frequency,
                "entry_rule": layer.entry_rule,
                "entries_sha256": layer.entries_sha256,
                "dtype": bundle.spectra[layer.name].dtype.name,
                **terms.get((layer.name, name), {}),
            }
            for layer in bundle.layers
        ],
    }
