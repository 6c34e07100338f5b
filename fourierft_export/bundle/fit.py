"""Whether an adapter belongs to a set of layers, whatever holds them.

A checkpoint, a live model and an ONNX graph each say what they hold in the place of an adapter's
layers and tensors (`FoundLayer`, `FoundTensor`, or in words why there is nothing). `fit_adapter`
compares, binds what is unbound and raises nothing; `check_fits` raises once, with all misfits of
all adapters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from ..errors import BaseMismatchError
from ..models.base import Base, BaseLayer
from ..spectral.entries import current_rule, entries_sha256, spectral_entries
from ..types import Array
from . import fingerprint
from .spec import AdapterSpec, Fingerprint, LayerSpec

LayerVerdict = Literal["same", "precision", "different", "unchecked"]


@dataclass(frozen=True)
class FoundLayer:
    """What is in the place of one of an adapter's layers.

    Attributes:
        shape: (out_features, in_features).
        transposed: the weight is stored as (in_features, out_features); None where it does not
            matter how it is stored.
        compare: what the fingerprint of the adapter's layer says of the weight; None where there
            is nothing to compare, as in a quantised layer.
        fingerprint: the weight's own fingerprint, for an adapter that has none yet; None where it
            is not wanted.
        name: what the weight is called there, if messages are to say it.
    """

    shape: tuple[int, int]
    transposed: bool | None = None
    compare: Callable[[Fingerprint], LayerVerdict] | None = None
    fingerprint: Callable[[], Fingerprint] | None = None
    name: str = ""


@dataclass(frozen=True)
class FoundTensor:
    """What is in the place of a dense tensor that an adapter brings (a head, a bias).

    Attributes:
        shape: of the tensor.
        quantised: it holds integers where the adapter has floats, so that it cannot be replaced.
        labels: rows that a head may have instead of its own: those of the adapter's head.
    """

    shape: tuple[int, ...]
    quantised: bool = False
    labels: int | None = None


@dataclass(frozen=True)
class Fit:
    """What `fit_adapter` says of one adapter.

    Attributes:
        name: how to speak of the adapter.
        spec: of the adapter, bound to what was found; names stay the adapter's.
        verdicts: layer -> what its fingerprint says; "unchecked" where either side has nothing to
            compare. Layers that do not fit are left out.
        misfits: a line for each layer or tensor that cannot fit, whatever the caller allows.
        places: layer -> what its weight is called there, for messages.
    """

    name: str
    spec: AdapterSpec
    verdicts: Mapping[str, LayerVerdict]
    misfits: tuple[str, ...]
    places: Mapping[str, str]

    def layers_with(self, verdict: LayerVerdict) -> list[str]:
        """The layers of this verdict."""
        return [layer for layer, one in self.verdicts.items() if one == verdict]

    def updated(self, verdicts: Mapping[str, LayerVerdict]) -> Fit:
        """The same with the verdicts of layers that were looked at again, more closely."""
        return replace(self, verdicts={**self.verdicts, **verdicts})

    @property
    def verdict(self) -> Literal["unbound", "mismatch", "precision", "same"]:
        """The verdicts as one word, as reports have it."""
        found = self.verdicts.values()
        if "different" in found:
            return "mismatch"
        return "precision" if "precision" in found else "same" if "same" in found else "unbound"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of an adapter that was let through."""
        different, unchecked = self.layers_with("different"), self.layers_with("unchecked")
        total = len(self.verdicts)
        notes = []
        if different:
            count = f"{len(different)} of {total} layers"
            notes.append(f"{self.name} was trained on another base in {count}; accepted, as asked")
        elif self.verdict == "precision":
            notes.append(f"{self.name} was trained on this base in another precision")
        if unchecked:
            what = "it belongs"
            if len(unchecked) < total:
                what = f"{len(unchecked)} of {total} layers ({unchecked[0]}, ...) belong"
            notes.append(f"{self.name}: no check was possible that {what} to this base")
        return tuple(notes)


def fit_adapter(
    spec: AdapterSpec,
    layers: Mapping[str, FoundLayer | str],
    saved: Mapping[str, Array] | None = None,
    tensors: Mapping[str, FoundTensor | str] | None = None,
    *,
    name: str = "the adapter",
    entry_rule: str | None = None,
) -> Fit:
    """Compare an adapter with what was found in the place of its layers and tensors.

    Args:
        spec: of the adapter (`Bundle.spec`), bound or not.
        layers: for every layer of `spec`, by the adapter's name: what is there, or why nothing is.
        saved: the adapter's dense tensors (`Bundle.saved`).
        tensors: for those of them that are to be judged: what is there, or why there is no place.
        name: how to speak of the adapter.
        entry_rule: for unbound layers; by default what the current torch does for each shape.

    Returns:
        The fit; nothing is raised, see `check_fits`.
    """
    bound: list[LayerSpec] = []
    verdicts: dict[str, LayerVerdict] = {}
    misfits: list[str] = []
    for layer in spec.layers:
        found = layers[layer.name]
        problem = found if isinstance(found, str) else _layer_problem(layer, found)
        if isinstance(found, str) or problem is not None:
            misfits.append(f"{layer.name}: {problem}")
            bound.append(layer)
            continue
        if layer.fingerprint is None or found.compare is None:
            verdicts[layer.name] = "unchecked"
        else:
            verdicts[layer.name] = found.compare(layer.fingerprint)
        bound.append(_bound_layer(spec.entry_seed, layer, found, entry_rule))
    for tensor, there in (tensors or {}).items():
        problem = there if isinstance(there, str) else _tensor_problem((saved or {})[tensor], there)
        if problem is not None:
            misfits.append(f"{tensor}: {problem}")
    places = {layer: f.name for layer, f in layers.items() if isinstance(f, FoundLayer)}
    return Fit(name, replace(spec, layers=tuple(bound)), verdicts, tuple(misfits), places)


def check_fits(
    where: str | os.PathLike[str],
    fits: Sequence[Fit],
    *,
    allow_base_mismatch: bool | None = False,
    remedy: str = "give the base that the adapter belongs to",
) -> None:
    """Raise if an adapter does not fit.

    Args:
        where: the base, for the error: a path, a model's class.
        fits: of all adapters.
        allow_base_mismatch: let other weights pass, never other shapes; None where the caller has
            no such option, so that the error does not speak of it.
        remedy: what to do.

    Raises:
        BaseMismatchError: listing every misfit of every adapter.
    """
    misfits: list[str] = []
    different: list[str] = []
    for fit in fits:
        prefix = f"{fit.name}: " if len(fits) > 1 else ""
        misfits += [prefix + line for line in fit.misfits]
        for layer in () if allow_base_mismatch else fit.layers_with("different"):
            line = f"{prefix}{layer}: another weight than the adapter was trained on"
            different.append(line + (f" ({fit.places[layer]})" if fit.places[layer] else ""))
    if not misfits and allow_base_mismatch is not None:
        remedy += ", or --allow-base-mismatch (allow_base_mismatch=True) if you know better"
    if misfits or different:
        raise BaseMismatchError(
            where,
            expected="the base that the adapter was trained on",
            found=f"{len(misfits) + len(different)} layers or tensors that do not fit",
            remedy=remedy,
            offenders=[*misfits, *different],
        )


def layers_of_base(
    base: Base, names: Iterable[str], *, thorough: bool = True
) -> dict[str, FoundLayer | str]:
    """What a checkpoint holds in the place of an adapter's layers, for `fit_adapter`.

    Args:
        base: an open checkpoint.
        names: of the layers.
        thorough: read the weights and hash them, and give unbound layers fingerprints; otherwise
            only the fingerprints' eight sampled values are read and compared.
    """

    def found(layer: BaseLayer) -> FoundLayer:
        def read() -> Array:
            return base.checkpoint.read(layer.tensor)

        def sampled(expected: Fingerprint) -> LayerVerdict:
            positions = fingerprint.sample_positions(prod(layer.shape))
            values = base.checkpoint.read_elements(layer.tensor, positions)
            return fingerprint.judge(expected, fingerprint.fingerprint_of_samples(expected, values))

        if not thorough:
            return FoundLayer(layer.shape, layer.transposed, sampled)
        return FoundLayer(
            layer.shape,
            layer.transposed,
            lambda expected: fingerprint.compare(expected, read()),
            lambda: fingerprint.fingerprint(read()),
        )

    there = base.find(names).items()
    return {name: layer if isinstance(layer, str) else found(layer) for name, layer in there}


def _layer_problem(layer: LayerSpec, found: FoundLayer) -> str | None:
    """Why a layer cannot belong to what is in its place."""
    if layer.shape is not None and layer.shape != found.shape:
        return f"shape {list(layer.shape)} expected, found {list(found.shape)}"
    if layer.shape is not None and found.transposed not in (None, layer.fan_in_fan_out):
        return "its weight is stored transposed to what the adapter says"
    if layer.n_frequency > prod(found.shape):
        return f"n_frequency {layer.n_frequency} above the size of {list(found.shape)}"
    return None


def _tensor_problem(tensor: Array, found: FoundTensor) -> str | None:
    """Why a dense tensor cannot take the place of what is there."""
    other_labels = tensor.shape == (found.labels, *found.shape[1:]) and found.shape
    if tensor.shape != found.shape and not other_labels:
        return f"shape {list(tensor.shape)} expected, found {list(found.shape)}"
    if found.quantised and tensor.dtype.kind not in "iub":
        return "floats expected, found integers (quantised)"
    return None


def _bound_layer(
    seed: int, layer: LayerSpec, found: FoundLayer, entry_rule: str | None
) -> LayerSpec:
    """The layer with what it lacks taken from what is there."""
    if layer.shape is None:
        rule, turned = entry_rule or current_rule(found.shape), bool(found.transposed)
        entries = spectral_entries(seed, found.shape, layer.n_frequency, rule)
        digest = entries_sha256(entries)
        layer = LayerSpec(layer.name, layer.n_frequency, found.shape, turned, rule, digest)
    if layer.fingerprint is None and found.fingerprint is not None:
        layer = replace(layer, fingerprint=found.fingerprint())
    return layer
