"""Combines adapters into one: delta_W = w_1 delta_W_1 + w_2 delta_W_2 + ..., exactly.

delta_W is linear in the spectrum: spectra with the same entries are added; otherwise the result has
the union of the entries. Nothing is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..errors import UsageError
from ..spectral.entries import entries_sha256
from ..types import Array
from .bundle import Bundle
from .spec import EXPLICIT_RULE, AdapterSpec, LayerSpec

AVERAGE = "average"


def checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Returns one finite factor for each of `count` bundles; 1 for each if `weights` is None."""
    if weights is None:
        return (1.0,) * count
    factors = tuple(float(weight) for weight in weights)
    if len(factors) != count or not all(map(math.isfinite, factors)):
        raise UsageError(
            "weights (--weight)",
            expected=f"finite numbers, one for each of {count} bundle(s)",
            found=", ".join(map(str, factors)) or "none",
        )
    return factors


def combine_bundles(
    bundles: Mapping[str, Bundle],
    weights: Sequence[float] | None = None,
    *,
    heads: str | None = None,
) -> Bundle:
    """Makes the adapter whose delta_W is the weighted sum of those of `bundles`.

    Spectra are added in double precision and stored as float32 (float64 if one of the bundles is).
    A layer keeps the seed's entries if all its adapters have them, or a part of them (a smaller
    n_frequency); other layers get the union of the entries, under the rule "explicit". Seed and
    scaling are those of the first bundle (scaling: the first that is not 0).

    Args:
        bundles: by name; bound to one base.
        weights: one finite factor for each; by default 1.
        heads: how to combine saved heads and biases, which cannot be added. None: each must be in
            one bundle only, or be equal in all that have it. The name of a bundle: all from that
            one. "average": the mean, weighted by `weights`, over the bundles that have it.
    """
    if not bundles:
        raise UsageError("combine", expected="one adapter or more", found="none")
    factors = dict(zip(bundles, checked_weights(weights, len(bundles)), strict=True))
    specs = [bundle.spec for bundle in bundles.values()]
    scaling = next((spec.scaling for spec in specs if spec.scaling), specs[0].scaling)
    layers: list[LayerSpec] = []
    spectra: dict[str, Array] = {}
    explicit: dict[str, Array] = {}
    for name in dict.fromkeys(layer.name for spec in specs for layer in spec.layers):
        shares = [
            (bundle, factors[label] * float(bundle.spec.scaling))
            for label, bundle in bundles.items()
            if name in bundle.spectra
        ]
        layer, total = _combine_layer(name, shares, specs[0].entry_seed, explicit)
        wide = any(bundle.spectra[name].dtype == np.float64 for bundle, _ in shares)
        layers.append(layer)
        spectra[name] = (total / (float(scaling) or 1.0)).astype(np.float64 if wide else np.float32)
    spec = AdapterSpec(
        seed=specs[0].seed,
        scaling=scaling,
        layers=tuple(layers),
        task_type=_common(spec.task_type for spec in specs),
        base_model=_common(spec.base_model for spec in specs),
    )
    saved = _combine_saved({label: b.saved for label, b in bundles.items()}, factors, heads)
    both = [f"{name}.weight" for name in spectra if f"{name}.weight" in saved]
    if both:
        raise UsageError(
            "combine",
            expected="weights that are either replaced or changed",
            found=f"{len(both)} weights that one adapter replaces and another changes",
            remedy="name in heads the adapter whose saved tensors to use, or leave one adapter out",
            offenders=[f"{name}: replaced by one, changed by another" for name in both],
        )
    return Bundle.build(spec, spectra, saved, explicit, where="combined adapter")


def _combine_layer(
    name: str, shares: Sequence[tuple[Bundle, float]], seed: int, explicit: dict[str, Array]
) -> tuple[LayerSpec, Array]:
    """Combines one layer: its spec and its spectrum (n,) float64, times the scaling."""
    layers = [bundle.layer(name) for bundle, _ in shares]
    widest = max(layers, key=lambda layer: layer.n_frequency)
    seeds = {bundle.spec.entry_seed for bundle, _ in shares}
    rules = {layer.entry_rule for layer in layers}
    if seeds == {seed} and len(rules) == 1 and EXPLICIT_RULE not in rules:
        # The first n of one permutation: shorter spectra end in zeros.
        total = np.zeros(widest.n_frequency)
        for bundle, factor in shares:
            spectrum = bundle.spectra[name].astype(np.float64)
            total[: len(spectrum)] += factor * spectrum
        return widest, total
    entries = np.concatenate([bundle.entries(name) for bundle, _ in shares])
    values = np.concatenate(
        [factor * bundle.spectra[name].astype(np.float64) for bundle, factor in shares]
    )
    # (u, v) and (-u, -v) are one basis function.
    shape = np.array(widest.shape)
    index, mirrored = (e[:, 0] * shape[1] + e[:, 1] for e in (entries, -entries % shape))
    places, inverse = np.unique(np.minimum(index, mirrored), return_inverse=True)
    summed: Array = np.bincount(inverse, weights=values, minlength=len(places))
    explicit[name] = np.stack(np.divmod(places, shape[1]), axis=1)
    digest = entries_sha256(explicit[name])
    spec = replace(widest, n_frequency=len(places), entry_rule=EXPLICIT_RULE, entries_sha256=digest)
    return spec, summed


def _common(values: Iterable[str | None]) -> str | None:
    """The value that all adapters which have one share, else None."""
    known = set(values) - {None}
    return known.pop() if len(known) == 1 else None


def _combine_saved(
    saved: Mapping[str, Mapping[str, Array]], factors: Mapping[str, float], heads: str | None
) -> dict[str, Array]:
    """Combines the saved tensors."""
    if heads is not None and heads in saved:
        return dict(saved[heads])
    if heads not in (None, AVERAGE):
        expected = f"one of {', '.join(saved)}, or {AVERAGE!r}"
        raise UsageError("heads", expected=expected, found=repr(heads))
    result: dict[str, Array] = {}
    clashes: list[str] = []
    for name in dict.fromkeys(name for tensors in saved.values() for name in tensors):
        owners = {label: tensors[name] for label, tensors in saved.items() if name in tensors}
        first, *more = owners.values()
        if all(_same(first, value) for value in more):
            result[name] = first
            continue
        mean = None
        if heads == AVERAGE:
            mean = _mean([(factors[label], value) for label, value in owners.items()])
        if mean is None:
            clashes.append(f"{name}: in {', '.join(owners)}")
        else:
            result[name] = mean
    if clashes:
        expected, remedy = "each saved head or bias in one adapter only", f", or {AVERAGE!r}"
        if heads is not None:
            expected, remedy = "float tensors of one shape, and weights whose sum is not 0", ""
        raise UsageError(
            "heads",
            expected=expected,
            found=f"{len(clashes)} tensors in several adapters",
            remedy=f"name in heads the adapter whose tensors to use{remedy}",
            offenders=clashes,
        )
    return result


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _mean(parts: Sequence[tuple[float, Array]]) -> Array | None:
    """The weighted mean in the first one's dtype; None for integers, other shapes, sum 0."""
    kinds = {(value.dtype, value.shape) for _, value in parts}
    total, dtype = sum(factor for factor, _ in parts), parts[0][1].dtype
    if len(kinds) > 1 or not total or dtype.kind in "iub":
        return None
    summed = sum(factor * value.astype(np.float64) for factor, value in parts)
    mean: Array = np.asarray(summed / total).astype(dtype)
    return mean
