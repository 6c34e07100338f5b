"""The adapters that go into a graph: always a mapping from name to bundle."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from ..bundle.bundle import Bundle
from ..bundle.peft import BundleSource, list_bundles, open_bundle
from ..bundle.pool import Pool, is_pool
from ..errors import UsageError
from ..spectral.delta import Term, add_delta_weight
from ..types import Array

Bundles = BundleSource | Sequence[BundleSource] | Mapping[str, BundleSource]


def bundle_sources(bundles: Bundles) -> list[BundleSource]:
    """The bundles or their paths, as a list."""
    return list(bundles.values()) if isinstance(bundles, Mapping) else list_bundles(bundles)


def named_bundles(bundles: Bundles) -> dict[str, Bundle]:
    """Opens the bundles, by name: "default" for one, "adapter_0", "adapter_1", ... for several."""
    if isinstance(bundles, Mapping):
        named = dict(bundles)
    else:
        given = list_bundles(bundles)
        if len(given) == 1 and isinstance(given[0], (str, os.PathLike)):
            path = given[0]
            if os.path.isfile(path) and is_pool(path):
                with Pool(path) as pool:
                    return dict(pool)
        several = len(given) > 1
        named = {f"adapter_{i}" if several else "default": one for i, one in enumerate(given)}
    if not named:
        raise UsageError("bundles", expected="at least one bundle", found="none")
    return {name: open_bundle(bundle) for name, bundle in named.items()}


def weighted(bundles: Mapping[str, Bundle], weights: Sequence[float]) -> dict[str, Bundle]:
    """The bundles with their scaling times their weight: delta_W is linear in the scaling."""
    return {
        name: bundle
        if weight == 1
        else replace(bundle, spec=replace(bundle.spec, scaling=bundle.spec.scaling * weight))
        for (name, bundle), weight in zip(bundles.items(), weights, strict=True)
    }


def without(bundle: Bundle, names: Container[str]) -> Bundle:
    """A bundle without these layers and saved tensors; all of it if no layer would be left."""
    layers = tuple(layer for layer in bundle.spec.layers if layer.name not in names)
    if not layers:
        return bundle
    return Bundle(
        replace(bundle.spec, layers=layers, peft_config={}),
        {layer.name: bundle.spectra[layer.name] for layer in layers},
        {name: array for name, array in bundle.saved.items() if name not in names},
        {n: array for n, array in bundle.explicit_entries.items() if n not in names},
    )


def layer_terms(bundles: Mapping[str, Bundle], layer: str) -> dict[str, Term]:
    """Adapter name -> its change of one layer, for those that change it."""
    return {
        name: Term(bundle.spectra[layer], bundle.entries(layer), float(bundle.spec.scaling))
        for name, bundle in bundles.items()
        if layer in bundle.spectra
    }


def adapted_weight(
    weight: Array,
    parts: Mapping[str, slice],
    terms: Mapping[str, Sequence[Term]],
    *,
    transposed: bool,
) -> Array:
    """A weight plus the changes of the layers that it holds, rounded once.

    Args:
        weight: (out, in), or (in, out) when `transposed`; it is not changed.
        parts: layer -> its outputs among those of the weight.
        terms: layer -> its changes.
        transposed: the weight is stored as (in, out).
    """
    outputs = weight.shape[int(transposed)]
    if [(part.start, part.stop) for part in parts.values()] == [(0, outputs)]:
        (whole,) = terms.values()
        new: Array = add_delta_weight(weight, whole, transposed=transposed)
        return new
    total: Array = weight.copy()
    for layer, part in parts.items():
        where = (slice(None), part) if transposed else (part,)
        total[where] = add_delta_weight(weight[where], terms[layer], transposed=transposed)
    return total
