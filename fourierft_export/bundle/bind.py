"""Binding: an adapter gets shapes, entries and fingerprints from a base, or is checked by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, Protocol

from ..errors import BaseMismatchError
from ..spectral.entries import current_rule, entries_sha256, spectral_entries
from ..types import Array
from . import fingerprint
from .spec import AdapterSpec, LayerSpec


class BoundLayer(Protocol):
    """What a base says of one linear layer (`models.base.BaseLayer` is one)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in_features, out_features)."""


class BaseLike(Protocol):
    """What `Bundle.bind` needs of a base (`models.base.Base` is one)."""

    def layers(self, modules: Iterable[str]) -> Mapping[str, Any]:
        """A `BoundLayer` per module path; raises BaseMismatchError naming all that are absent."""

    def weight(self, module: str) -> Array:
        """The layer's weight as stored."""


def bound_spec(spec: AdapterSpec, base: BaseLike, entry_rule: str | None) -> AdapterSpec:
    """`spec` bound to `base`; layers that have a fingerprint already are checked and kept.

    Raises:
        BaseMismatchError: layers that are absent, too small, of another shape, or whose weight is
            not the fingerprinted one: all of them listed.
    """
    found = base.layers([layer.name for layer in spec.layers])
    offenders: list[str] = []
    bound: list[LayerSpec] = []
    for layer in spec.layers:
        there: BoundLayer = found[layer.name]
        problem = _mismatch(layer, there)
        if problem is None and layer.fingerprint is not None:
            verdict = fingerprint.compare(layer.fingerprint, base.weight(layer.name))
            if verdict == "different":
                problem = "another weight than the adapter was trained on"
        if problem:
            offenders.append(f"{layer.name}: {problem}")
        elif layer.is_bound and layer.fingerprint:
            bound.append(layer)
        else:
            weight = base.weight(layer.name)
            bound.append(_bound_layer(spec.entry_seed, layer, there, weight, entry_rule))
    if offenders:
        raise BaseMismatchError(
            getattr(base, "directory", "base"),
            expected="the base that the adapter was trained on",
            found=f"{len(offenders)} of {len(spec.layers)} layers that do not fit",
            remedy="give the base model that the adapter belongs to",
            offenders=offenders,
        )
    return replace(spec, layers=tuple(bound))


def _bound_layer(
    seed: int, layer: LayerSpec, there: BoundLayer, weight: Array, entry_rule: str | None
) -> LayerSpec:
    shape = there.shape
    rule = layer.entry_rule or entry_rule or current_rule(shape)
    digest = layer.entries_sha256 or entries_sha256(
        spectral_entries(seed, shape, layer.n_frequency, rule)
    )
    return replace(
        layer,
        shape=shape,
        fan_in_fan_out=there.fan_in_fan_out,
        entry_rule=rule,
        entries_sha256=digest,
        fingerprint=fingerprint.fingerprint(weight),
    )


def _mismatch(layer: LayerSpec, there: BoundLayer) -> str | None:
    """Why a layer cannot belong to what the base has in its place."""
    if layer.shape is not None and layer.shape != there.shape:
        return f"shape {list(layer.shape)} expected, found {list(there.shape)}"
    if layer.shape is not None and layer.fan_in_fan_out != there.fan_in_fan_out:
        return "stored transposed to what the adapter says"
    if layer.n_frequency > prod(there.shape):
        return f"n_frequency {layer.n_frequency} above the size of {list(there.shape)}"
    return None
