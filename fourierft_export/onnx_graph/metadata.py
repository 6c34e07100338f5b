"""What an exported file says of the adapters in it, so that a bundle can be got back out of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle.file import Bundle
from .groups import Interface

KEY = "fourierft_export"
SCHEMA = 1


@dataclass(frozen=True)
class Written:
    """What became of one site.

    Attributes:
        layer: module path.
        weight: name of the initializer that holds the weight, W or W + delta_W.
        transposed: it holds it as (in, out).
        terms: per adapter the names of its initializers: "spectrum", "entries", "scaling"; empty
            when merged.
    """

    layer: str
    weight: str
    transposed: bool
    terms: Mapping[str, Mapping[str, str]]


def describe(
    *,
    version: str,
    mode: str,
    adapters: Mapping[str, Bundle],
    sources: Mapping[str, Bundle],
    written: Iterable[Written],
    interface: Interface | None = None,
) -> dict[str, str]:
    """The `metadata_props` of a model: one entry, `KEY`, a canonical JSON object.

    Args:
        version: of this package.
        mode: the export mode.
        adapters: adapter name -> the adapter as it is in the model.
        sources: adapter name -> the bundle it came from, where there is one.
        written: where each layer's weight and, unmerged, its adapters' tensors are.
        interface: the graph's adapter inputs, where it has any.

    Returns:
        {KEY: text} with "schema", "version", "mode"; "weights", per layer the initializers that
        hold its weight and whether as (in, out); "adapters", per name "seed", "scaling"
        (a bundle's own times its weight), "bundle_scaling", "bundle_sha256", "task_type", "saved"
        (names of its dense tensors, which are baked in) and "layers": name, shape, n_frequency,
        entry_rule, entries_sha256, dtype of the spectrum, and unmerged the names of the
        initializers "spectrum", "entries", "scaling"; "inputs", the adapter inputs
        (`Interface.to_dict`), with "rows", the adapters' names in the order of a bank's table.
    """
    sites = list(written)
    weights: dict[str, list[dict[str, Any]]] = {}
    for one in sites:
        weights.setdefault(one.layer, []).append(
            {"initializer": one.weight, "transposed": one.transposed}
        )
    tensors = {(one.layer, name): names for one in sites for name, names in one.terms.items()}
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "version": version,
        "mode": mode,
        "weights": weights,
        "adapters": {
            name: _adapter(name, bundle, sources.get(name, bundle), tensors)
            for name, bundle in adapters.items()
        },
    }
    if interface is not None:
        content["inputs"] = {**interface.to_dict(), "rows": list(adapters)}
    return {KEY: json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)}


def _adapter(
    name: str,
    bundle: Bundle,
    source: Bundle,
    tensors: Mapping[tuple[str, str], Mapping[str, str]],
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
                **tensors.get((layer.name, name), {}),
            }
            for layer in bundle.layers
        ],
    }
