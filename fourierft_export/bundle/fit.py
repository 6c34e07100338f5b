"""Decides whether an adapter belongs to a base: a checkpoint, a live model or an ONNX graph.

The caller describes the base's layers and tensors that match the adapter's (`FoundLayer`,
`FoundTensor`, or a text that says why there is none). `fit_adapter` compares them, binds unbound
layers and never raises; `check_fits` raises one error with all misfits of all adapters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from ..errors import BaseMismatchError
from ..models.adapter_names_in_base import find_bridge
from ..models.base_tensors import Base, BaseLayer, is_embedding
from ..spectral.entries import current_rule, entries_sha256, spectral_entries
from ..types import Array
from . import fingerprint
from .spec import AdapterSpec, Fingerprint, LayerSpec

log = logging.getLogger(__name__)
LayerVerdict = Literal["same", "precision", "different", "unchecked"]


@dataclass(frozen=True)
class FoundLayer:
    """The base's layer that matches one of an adapter's layers.

    Attributes:
        shape: (out_features, in_features).
        transposed: the weight is stored as (in_features, out_features); None: does not matter.
        compare: compares the weight with a fingerprint; None if it cannot, as if quantised.
        fingerprint: computes the fingerprint for an adapter without one; None to do without.
        name: of the weight in the base, for messages.
    """

    shape: tuple[int, int]
    transposed: bool | None = None
    compare: Callable[[Fingerprint], LayerVerdict] | None = None
    fingerprint: Callable[[], Fingerprint] | None = None
    name: str = ""


@dataclass(frozen=True)
class FoundTensor:
    """The base's tensor that one of an adapter's saved tensors (a head, a bias) replaces.

    Attributes:
        shape: of the tensor.
        quantised: it holds integers, so that floats cannot replace it.
        labels: another number of rows that is allowed: the labels of the adapter's head.
    """

    shape: tuple[int, ...]
    quantised: bool = False
    labels: int | None = None


@dataclass(frozen=True)
class Fit:
    """The result of `fit_adapter` for one adapter.

    Attributes:
        name: of the adapter in messages.
        spec: of the adapter, bound to the base; names stay the adapter's.
        verdicts: result of comparing the fingerprint of each layer that fits.
        misfits: a line for each layer or tensor that cannot fit, whatever the caller allows.
        places: layer -> name of its weight in the base, for messages.
    """

    name: str
    spec: AdapterSpec
    verdicts: Mapping[str, LayerVerdict]
    misfits: tuple[str, ...]
    places: Mapping[str, str]

    def layers_with(self, verdict: LayerVerdict) -> list[str]:
        """Names of the layers with this verdict."""
        return [layer for layer, one in self.verdicts.items() if one == verdict]

    def updated(self, verdicts: Mapping[str, LayerVerdict]) -> Fit:
        """A copy with these layers' verdicts replaced, after a closer comparison."""
        return replace(self, verdicts={**self.verdicts, **verdicts})

    @property
    def verdict(self) -> Literal["unbound", "mismatch", "precision", "same"]:
        """All verdicts as the one word that reports use."""
        found = self.verdicts.values()
        if "different" in found:
            return "mismatch"
        return "precision" if "precision" in found else "same" if "same" in found else "unbound"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about an adapter that was accepted."""
        different, unchecked = self.layers_with("different"), self.layers_with("unchecked")
        total = len(self.verdicts)
        notes = []
        if different:
            notes.append(
                f"{self.name} was trained on another base in {len(different)} of {total} layers; "
                "accepted, since base mismatches are allowed"
            )
        elif self.verdict == "precision":
            notes.append(f"{self.name} was trained on this base in another precision")
        if unchecked:
            which = "it belongs"
            if len(unchecked) < total:
                which = f"{len(unchecked)} of {total} layers ({unchecked[0]}, ...) belong"
            notes.append(f"{self.name}: no check was possible that {which} to this base")
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
    """Compares an adapter with the base's layers and tensors that match its own; never raises.

    Args:
        spec: of the adapter (`Bundle.spec`), bound or not.
        layers: for every layer of `spec`: the base's layer, or why there is none.
        saved: the adapter's dense tensors (`Bundle.saved`).
        tensors: the same for saved tensors; those left out are not compared.
        name: of the adapter in messages.
        entry_rule: for unbound layers; by default what the current torch does for each shape.
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
            if is_embedding(tensor) and not isinstance(there, str):
                rows = (saved or {})[tensor].shape[0]
                misfits[-1] += (
                    f"; the adapter was trained after model.resize_token_embeddings({rows}): call "
                    "it on the base, save_pretrained it, and give that folder"
                )
    places = {layer: f.name for layer, f in layers.items() if isinstance(f, FoundLayer)}
    return Fit(name, replace(spec, layers=tuple(bound)), verdicts, tuple(misfits), places)


def fit_by_names(
    spec: AdapterSpec,
    saved: Mapping[str, Array],
    modules: Collection[str],
    layer_at: Callable[[str], FoundLayer | str],
    tensor_at: Callable[[str], FoundTensor | None],
    holder: str,
) -> tuple[Fit, dict[str, str], dict[str, str]]:
    """Fits an adapter to a model or graph whose names may differ by one prefix.

    Saved tensors of the task model around a bare base, such as its head, are left out.

    Args:
        spec, saved: of the adapter.
        modules: paths of the base's modules.
        layer_at: finds the base's layer at a path.
        tensor_at: finds the base's tensor of a name.
        holder: what the base is, for messages: "model" or "graph".

    Returns:
        The fit; layer -> path in the base; saved tensor -> name in the base, if it has a place.
    """
    roots = {path.split(".")[0] for path in modules}
    bridge = find_bridge([layer.name for layer in spec.layers], roots, modules.__contains__)
    paths = {layer.name: bridge.to_base(layer.name) for layer in spec.layers}
    names: dict[str, str] = {}
    tensors: dict[str, FoundTensor | str] = {}
    for name in saved:
        candidates = ((to, tensor_at(to)) for to in (bridge.to_base(name), name))
        to, found = next((one for one in candidates if one[1] is not None), (name, None))
        if found is not None:
            taken = to in names.values()
            tensors[name] = f"another saved tensor replaces {to}, too" if taken else found
            names[name] = to
        elif bridge.strip and not name.startswith(f"{bridge.strip}."):
            log.warning("%s: this bare %s has no place for it; left out", name, holder)
        else:
            tensors[name] = f"no such tensor in the {holder}"
    layers = {name: layer_at(path) for name, path in paths.items()}
    return fit_adapter(spec, layers, saved, tensors), paths, names


def check_fits(
    where: str | os.PathLike[str],
    fits: Sequence[Fit],
    *,
    allow_base_mismatch: bool | None = False,
    remedy: str = "give the base that the adapter belongs to",
) -> None:
    """Raises a BaseMismatchError that lists every misfit of every adapter.

    Args:
        where: the base as the error names it: a path, a model's class.
        fits: of all adapters.
        allow_base_mismatch: accept other weights, never other shapes; None if the caller has no
            such option, so that the error does not mention it.
        remedy: what the user can do.
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
        remedy += ", or accept this one with --allow-base-mismatch (allow_base_mismatch=True)"
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
    """Finds an adapter's layers in a checkpoint, for `fit_adapter`.

    Args:
        base: an open checkpoint.
        names: of the adapter's layers.
        thorough: read and hash whole weights, and give unbound layers fingerprints; otherwise
            read and compare only eight sampled values of each weight.
    """

    def found(layer: BaseLayer) -> FoundLayer:
        def read() -> Array:
            return base.checkpoint.read(layer.tensor)

        def sampled(expected: Fingerprint) -> LayerVerdict:
            positions = fingerprint.sample_positions(prod(layer.shape))
            values = base.checkpoint.read_elements(layer.tensor, positions)
            return fingerprint.compare_fingerprints(
                expected, fingerprint.fingerprint_of_samples(expected, values)
            )

        if not thorough:
            return FoundLayer(layer.shape, layer.transposed, sampled)
        return FoundLayer(
            layer.shape,
            layer.transposed,
            lambda expected: fingerprint.compare_weight(expected, read()),
            lambda: fingerprint.fingerprint(read()),
        )

    return {
        name: layer if isinstance(layer, str) else found(layer)
        for name, layer in base.find(names).items()
    }


def _layer_problem(layer: LayerSpec, found: FoundLayer) -> str | None:
    """Says why a layer cannot be the base's; None if it can."""
    if layer.shape is not None and layer.shape != found.shape:
        return f"shape {list(layer.shape)} expected, found {list(found.shape)}"
    if layer.shape is not None and found.transposed not in (None, layer.fan_in_fan_out):
        stored = "(in, out)" if found.transposed else "(out, in)"
        return f"its weight is stored as {stored}, unlike that of the adapter's base"
    if layer.n_frequency > prod(found.shape):
        return f"n_frequency {layer.n_frequency} above the size of {list(found.shape)}"
    return None


def _tensor_problem(tensor: Array, found: FoundTensor) -> str | None:
    """Says why a saved tensor cannot replace the base's; None if it can."""
    other_labels = tensor.shape == (found.labels, *found.shape[1:]) and found.shape
    if tensor.shape != found.shape and not other_labels:
        return f"shape {list(tensor.shape)} expected, found {list(found.shape)}"
    if found.quantised and tensor.dtype.kind not in "iub":
        return "floats expected, found integers (quantised)"
    return None


def _bound_layer(
    seed: int, layer: LayerSpec, found: FoundLayer, entry_rule: str | None
) -> LayerSpec:
    """Adds the shape, entries and fingerprint that an unbound layer lacks."""
    if layer.shape is None:
        rule, transposed = entry_rule or current_rule(found.shape), bool(found.transposed)
        entries = spectral_entries(seed, found.shape, layer.n_frequency, rule)
        digest = entries_sha256(entries)
        layer = LayerSpec(layer.name, layer.n_frequency, found.shape, transposed, rule, digest)
    if layer.fingerprint is None and found.fingerprint is not None:
        layer = replace(layer, fingerprint=found.fingerprint())
    return layer
