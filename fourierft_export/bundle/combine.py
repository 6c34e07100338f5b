"""Several adapters as one: delta_W = w_1 delta_W_1 + w_2 delta_W_2 + ..., exactly.

delta_W is linear in the spectrum, so where adapters share entries their spectra add up, and
otherwise their entries are united. Nothing is approximated, whatever the number of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import BadInputError, BaseMismatchError, UsageError
from ..spectral.entries import entries_sha256
from ..types import Array
from .file import Bundle
from .spec import EXPLICIT_RULE, AdapterSpec, LayerSpec

AVERAGE = "average"


def checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite factor for each of `count` bundles.

    Args:
        weights: as they were given; None for 1 each.
        count: how many bundles there are.

    Raises:
        UsageError: another number of weights, or one that is not finite.
    """
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
    bundles: Sequence[Bundle],
    weights: Sequence[float] | None = None,
    *,
    heads: int | str | None = None,
    names: Sequence[str] | None = None,
) -> Bundle:
    """The adapter whose delta_W is the weighted sum of those of `bundles`.

    Its spectra are sums in double precision, stored as float32 (float64 if one of the bundles
    is). A layer keeps the seed's entries if all its adapters have them, or a part of them (a
    smaller n_frequency); the other layers get the union of the entries, under the `explicit` rule.
    Seed and scaling are those of the first bundle (the first whose scaling is not 0).

    Args:
        bundles: one or more, on one base; with different seeds or entry rules they must be bound.
        weights: one finite factor for each; by default 1.
        heads: dense tensors (saved heads, biases) replace each other and do not add up. None
            takes each from the only bundle that has it, or from several that agree; a bundle's
            place in `bundles` takes those of that one and no others; "average" takes means,
            weighted by `weights`, over the bundles that have the tensor.
        names: what errors call the bundles.

    Raises:
        UsageError: no bundles, or weights that do not fit; more than one brings a tensor, and
            `heads` does not say what to do; one replaces a weight that another changes; unbound
            bundles that must be bound.
        BaseMismatchError: they belong to different bases; all layers listed.
    """
    if not bundles:
        raise UsageError("combine", expected="one adapter or more", found="none")
    factors = checked_weights(weights, len(bundles))
    labels = list(names or (f"bundle {i}" for i in range(len(bundles))))
    _check_together(bundles, labels)
    first = bundles[0].spec
    scaling = next((b.spec.scaling for b in bundles if b.spec.scaling), first.scaling)
    specs: list[LayerSpec] = []
    spectra: dict[str, Array] = {}
    explicit: dict[str, Array] = {}
    for name in dict.fromkeys(layer.name for bundle in bundles for layer in bundle.layers):
        shares = [
            (bundle, weight * float(bundle.spec.scaling))
            for bundle, weight in zip(bundles, factors, strict=True)
            if name in bundle.spectra
        ]
        layer, total = _together(name, shares, first.entry_seed, explicit)
        wide = any(bundle.spectra[name].dtype == np.float64 for bundle, _ in shares)
        specs.append(layer)
        spectra[name] = (total / (float(scaling) or 1.0)).astype(np.float64 if wide else np.float32)
    spec = AdapterSpec(
        seed=first.seed,
        scaling=scaling,
        layers=tuple(specs),
        task_type=_common([b.spec.task_type for b in bundles]),
        base_model=_common([b.spec.base_model for b in bundles]),
    )
    saved = _saved([b.saved for b in bundles], factors, heads, labels)
    _check_not_replaced(spectra, saved)
    return Bundle.build(spec, spectra, saved, explicit, where="combined adapter")


def _check_together(bundles: Sequence[Bundle], labels: Sequence[str]) -> None:
    """Whether all bundles change the same base, as far as they tell."""
    first: dict[str, tuple[LayerSpec, str]] = {}
    wrong: list[str] = []
    for bundle, label in zip(bundles, labels, strict=True):
        for layer in bundle.layers:
            there, owner = first.setdefault(layer.name, (layer, label))
            problem = _misfit(there, layer)
            if problem:
                wrong.append(f"{layer.name}: {problem} in {owner} and {label}")
    for name in first:
        _, _, rest = name.partition(".")
        # An adapter that has both means two layers.
        if rest in first and not any({name, rest} <= set(b.spectra) for b in bundles):
            wrong.append(f"{name}: called {rest} by another adapter")
    if wrong:
        raise BaseMismatchError(
            "combine",
            expected="adapters of one base",
            found=f"{len(wrong)} layers that differ",
            remedy="combine adapters that were trained on the same model",
            offenders=wrong,
        )
    alike = all(bundle.spec.entry_seed == bundles[0].spec.entry_seed for bundle in bundles)
    bound = [bundle.is_bound for bundle in bundles]
    if not all(bound) and (any(bound) or not alike):
        raise UsageError(
            "combine",
            expected="bound bundles",
            found=", ".join(label for label, is_ in zip(labels, bound, strict=True) if not is_)
            + " without layer shapes",
            remedy="bind them first: bundle.bind(BASE_DIR), or pack with --base BASE_DIR",
        )


def _misfit(one: LayerSpec, other: LayerSpec) -> str | None:
    if (one.shape, one.fan_in_fan_out) != (other.shape, other.fan_in_fan_out):
        return None if None in (one.shape, other.shape) else "other shapes"
    a, b = one.fingerprint, other.fingerprint
    if a is not None and b is not None and a.dtype == b.dtype and a.digest != b.digest:
        return "other base weights"
    return None


def _together(
    name: str, shares: Sequence[tuple[Bundle, float]], seed: int, explicit: dict[str, Array]
) -> tuple[LayerSpec, Array]:
    """One layer of the result and its spectrum (n,) float64, times the scaling."""
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
        return replace(widest, fingerprint=_fingerprint(layers)), total
    shape = layers[0].shape
    if shape is None:
        raise BadInputError(f"layer {name}", expected="a bound bundle", remedy="bind it first")
    entries = np.concatenate([bundle.entries(name) for bundle, _ in shares])
    values = np.concatenate(
        [factor * bundle.spectra[name].astype(np.float64) for bundle, factor in shares]
    )
    # (u, v) and (-u, -v) are one basis function.
    mirrored = -entries % np.array(shape)
    index, other = (e[:, 0] * shape[1] + e[:, 1] for e in (entries, mirrored))
    places, inverse = np.unique(np.minimum(index, other), return_inverse=True)
    summed: Array = np.bincount(inverse, weights=values, minlength=len(places))
    explicit[name] = np.stack(np.divmod(places, shape[1]), axis=1)
    spec = replace(
        widest,
        n_frequency=len(places),
        entry_rule=EXPLICIT_RULE,
        entries_sha256=entries_sha256(explicit[name]),
        fingerprint=_fingerprint(layers),
    )
    return spec, summed


def _fingerprint(layers: Sequence[LayerSpec]) -> Any:
    return next((layer.fingerprint for layer in layers if layer.fingerprint), None)


def _common(values: Sequence[str | None]) -> str | None:
    """The value that all which have one share, else None."""
    there = {value for value in values if value is not None}
    return there.pop() if len(there) == 1 else None


def _saved(
    each: Sequence[Mapping[str, Array]],
    factors: Sequence[float],
    heads: int | str | None,
    labels: Sequence[str],
) -> dict[str, Array]:
    """The dense tensors of the result."""
    if isinstance(heads, int) and 0 <= heads < len(each):
        return dict(each[heads])
    if heads not in (None, AVERAGE):
        raise UsageError(
            "heads",
            expected=f"a bundle's place below {len(each)}, {AVERAGE!r} or None",
            found=repr(heads),
        )
    saved: dict[str, Array] = {}
    clashes: list[str] = []
    for name in dict.fromkeys(name for one in each for name in one):
        owners = [i for i, one in enumerate(each) if name in one]
        values = [each[i][name] for i in owners]
        if all(_same(values[0], value) for value in values):
            saved[name] = values[0]
            continue
        mean = _mean(values, [factors[i] for i in owners]) if heads == AVERAGE else None
        if mean is None:
            clashes.append(f"{name}: in {', '.join(labels[i] for i in owners)}")
        else:
            saved[name] = mean
    if clashes:
        raise UsageError(
            "heads",
            expected="one adapter that brings each saved head or bias"
            if heads is None
            else "float tensors of one shape, and weights whose sum is not 0",
            found=f"{len(clashes)} tensors that several bring",
            remedy=f"say whose to take, or {AVERAGE!r}, in heads"
            if heads is None
            else "say whose to take in heads",
            offenders=clashes,
        )
    return saved


def _check_not_replaced(spectra: Mapping[str, Array], saved: Mapping[str, Array]) -> None:
    """A weight that one adapter replaces and another one changes has no sum."""
    both = [
        f"{name}.weight: replaced by one, changed by another"
        for name in spectra
        if f"{name}.weight" in saved
    ]
    if both:
        raise UsageError(
            "combine",
            expected="weights that are either replaced or changed",
            found=f"{len(both)} that adapters do both to",
            remedy="say in heads whose saved tensors to take, or leave one adapter out",
            offenders=both,
        )


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _mean(values: Sequence[Array], factors: Sequence[float]) -> Array | None:
    """The weighted mean in the first one's dtype; None where there is none."""
    kinds = {(value.dtype, value.shape) for value in values}
    total = sum(factors)
    if len(kinds) > 1 or not total or values[0].dtype.kind in "iub":
        return None
    summed = sum(f * v.astype(np.float64) for f, v in zip(factors, values, strict=True))
    mean: Array = np.asarray(summed / total).astype(values[0].dtype)
    return mean
