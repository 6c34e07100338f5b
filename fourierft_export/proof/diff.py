"""Measures how two adapters, checkpoints or ONNX files differ, without running them.

Norms of delta_W come from its spectrum: by Parseval's theorem they are those of fft2(delta_W),
divided by the square root of the number of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..bundle.bundle import Bundle
from ..bundle.spec import LayerSpec
from ..types import Array

Spectrum = dict[int, float]


class Weights(NamedTuple):
    """The weights of a checkpoint or an ONNX file."""

    tensors: Mapping[str, object]  # by name
    read: Callable[[str], Array]


def compare_adapters(left: Bundle, right: Bundle) -> dict[str, Any]:
    """Compares two adapters: settings, entries, and each layer's spectrum and delta_W.

    Returns:
        JSON-ready data. For each layer of both: whether its entries are the same, the norms of both
        delta_W, the norm of their difference and the cosine between them; None where a bundle is
        unbound, whose layers have no shapes. For each saved tensor the norm of the difference; None
        where one side lacks it, or has another shape.
    """
    names = {layer.name: layer for layer in left.layers}, {one.name: one for one in right.layers}
    layers = []
    for name in (name for name in names[0] if name in names[1]):
        a, b = names[0][name], names[1][name]
        layers.append({"name": name, **_compare_layer(left, a, right, b)})
    settings = (left.spec, right.spec)
    saved = {
        name: _distance(left.saved[name], right.saved[name]) if name in right.saved else None
        for name in left.saved
    } | dict.fromkeys(right.saved.keys() - left.saved.keys())
    return {
        "seed": [spec.seed for spec in settings],
        "scaling": [float(spec.scaling) for spec in settings],
        "only_left": sorted(names[0].keys() - names[1].keys()),
        "only_right": sorted(names[1].keys() - names[0].keys()),
        "layers": layers,
        "saved": saved,
    }


def compare_weights(left: Weights, right: Weights) -> dict[str, Any]:
    """Compares weights by name: for each tensor that differs, the norm of the difference."""
    tensors, same = {}, 0
    for name in (name for name in left.tensors if name in right.tensors):
        a, b = left.read(name), right.read(name)
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            tensors[name] = _distance(a, b)
        else:
            same += 1
    return {
        "only_left": sorted(left.tensors.keys() - right.tensors.keys()),
        "only_right": sorted(right.tensors.keys() - left.tensors.keys()),
        "tensors": tensors,
        "same": same,
    }


def delta_norm(bundle: Bundle, layer: LayerSpec) -> float:
    """Computes the Frobenius norm of delta_W of a layer of a bound bundle."""
    return _norm(_spectrum(bundle, layer), layer)


def _compare_layer(left: Bundle, a: LayerSpec, right: Bundle, b: LayerSpec) -> dict[str, Any]:
    if a.shape is None or a.shape != b.shape:
        found = dict.fromkeys(("same_entries", "distance", "cosine"))
        return {**found, "norms": [None if x.shape is None else _norm(_spectrum(y, x), x)
                                   for x, y in ((a, left), (b, right))]}  # fmt: skip
    one, other = _spectrum(left, a), _spectrum(right, b)
    norms = [_norm(one, a), _norm(other, b)]
    places = one.keys() | other.keys()
    change = {place: one.get(place, 0.0) - other.get(place, 0.0) for place in places}
    product = sum(one[place] * other.get(place, 0.0) for place in one) / (a.shape[0] * a.shape[1])
    return {
        "same_entries": np.array_equal(left.entries(a.name), right.entries(b.name)),
        "norms": norms,
        "distance": _norm(change, a),
        "cosine": product / (norms[0] * norms[1]) if all(norms) else None,
    }


def _spectrum(bundle: Bundle, layer: LayerSpec) -> Spectrum:
    """Returns fft2(delta_W) where it is not zero, by flat position.

    delta_W is a real part: half of each coefficient lies at its entry (u, v), half at (-u, -v).
    """
    entries = np.asarray(bundle.entries(layer.name))
    shape = np.array(layer.shape)
    places = np.concatenate([entries, -entries % shape]) @ np.array([shape[1], 1])
    halves = bundle.spectra[layer.name].astype(np.float64) * float(bundle.spec.scaling) / 2
    found: Spectrum = {}
    for place, value in zip(places.tolist(), np.tile(halves, 2).tolist(), strict=True):
        found[place] = found.get(place, 0.0) + value
    return found


def _norm(spectrum: Spectrum, layer: LayerSpec) -> float:
    rows, columns = layer.shape or (1, 1)
    return sqrt(sum(value * value for value in spectrum.values()) / (rows * columns))


def _distance(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> float | None:
    """Returns the norm of the difference; None between arrays of different shapes."""
    if left.shape != right.shape:
        return None
    return float(np.linalg.norm((left.astype(np.float64) - right.astype(np.float64)).ravel()))
