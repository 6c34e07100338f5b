"""What an adapter feeds the inputs of a graph, checked against the graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.fingerprint import compare_fingerprints
from ..bundle.fit import FoundLayer, FoundTensor, check_fits, fit_adapter
from ..errors import BadInputError, BaseMismatchError
from ..models.adapter_names_in_base import find_bridge
from ..types import Array
from .adapter_interface import PREFIX, Group, Interface
from .adapters import without

log = logging.getLogger(__name__)


def feed_bundle(
    interface: Interface,
    bundle: Bundle,
    base: Mapping[str, Array],
    *,
    where: str = "adapter",
    allow_base_mismatch: bool = False,
) -> dict[str, Array]:
    """What a bundle feeds every input of a graph, by name, checked against the graph.

    Layer names may differ by one leading segment, as in `attach`. An unbound bundle takes its
    shapes from the graph. Layers that the adapter does not change, and saved tensors that it does
    not have, are the base's (`base`: saved tensor -> the base's own).

    Raises:
        BaseMismatchError: layers or tensors that the graph lacks or has in other shapes, tensors
            that neither base nor adapter has, another base: all of them listed.
    """
    groups = interface.layers
    roots = {name.split(".")[0] for name in groups}
    bridge = find_bridge([layer.name for layer in bundle.layers], roots, groups.__contains__)
    if interface.partial:
        places = {name: bridge.to_base(name) for name in bundle.spectra}
        places |= {name: bridge.to_base(name) for name in bundle.saved}
        known_names = {*groups, *(tensor.name for tensor in interface.saved)}
        bundle = without(bundle, {name for name, at in places.items() if at not in known_names})
    layers: dict[str, FoundLayer | str] = {}
    for name in bundle.spectra:
        there = bridge.to_base(name)
        group, known = groups.get(there), interface.fingerprints.get(there)
        layers[name] = (
            FoundLayer(
                group.shape, compare=partial(compare_fingerprints, found=known) if known else None
            )
            if group
            else "the graph has no adapter input for this layer"
        )
    tensors: dict[str, FoundTensor | str] = {}
    saved: dict[str, Array] = {}
    inputs = {tensor.name: tensor for tensor in interface.saved}
    for name, array in bundle.saved.items():
        known_as = [one for one in (bridge.to_base(name), name) if one in inputs]
        if known_as:
            tensors[name] = FoundTensor(inputs[known_as[0]].shape)
            saved[known_as[0]] = array
        elif bridge.strip and not name.startswith(f"{bridge.strip}."):
            log.warning("%s: this bare graph has no place for it; left out", name)
        else:
            tensors[name] = "the graph has no input for this tensor"
    found = fit_adapter(bundle.spec, layers, bundle.saved, tensors)
    missing = [
        f"{name}: neither the base nor the adapter has one" for name in interface.not_brought(saved)
    ]
    check_fits(
        where,
        [replace(found, misfits=(*found.misfits, *missing))],
        allow_base_mismatch=allow_base_mismatch,
        remedy="export the graph with an adapter that has these layers and tensors, for its base",
    )
    bound = Bundle(
        replace(
            found.spec,
            layers=tuple(replace(one, name=bridge.to_base(one.name)) for one in found.spec.layers),
        ),
        {bridge.to_base(name): spectrum for name, spectrum in bundle.spectra.items()},
        saved,
        {bridge.to_base(name): entries for name, entries in bundle.explicit_entries.items()},
    )
    return full_feeds(interface, bound, base)


def has_fingerprints(bundle: Bundle) -> bool:
    """Whether every layer has a fingerprint, which `feed_bundle` compares with the graph's."""
    return all(layer.fingerprint is not None for layer in bundle.layers)


def full_feeds(interface: Interface, bundle: Bundle, base: Mapping[str, Array]) -> dict[str, Array]:
    """Everything that a bound bundle with the graph's names feeds."""
    missing = interface.not_brought(bundle.saved)
    if missing:
        raise BaseMismatchError(
            "adapter",
            expected="an adapter with every tensor that the base lacks",
            found=f"{len(missing)} that neither has",
            remedy="leave this adapter out, or train it with the head",
            offenders=missing,
        )
    return spectral_feeds(interface.groups, bundle) | {
        one.name: bundle.saved.get(one.name, base[one.name]).astype(
            ml_dtypes.bfloat16 if one.dtype == "bfloat16" else one.dtype
        )
        for one in interface.saved
    }


def check_parameters(interface: Interface, parameters: Mapping[str, Array], where: str) -> None:
    """Refuse parameters (of an .onnx_adapter file) that the graph cannot take: all listed."""
    wrong = list(_misfits(interface, parameters))
    if wrong:
        raise BadInputError(
            where,
            expected="parameters for this graph",
            found=wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            remedy="pack the adapter for this very graph: pack --to onnx-adapter --onnx FILE.onnx",
            offenders=wrong,
        )


def _misfits(interface: Interface, parameters: Mapping[str, Array]) -> Iterable[str]:
    known: dict[str, tuple[str, tuple[int, ...]]] = {
        saved.name: (saved.dtype, saved.shape) for saved in interface.saved
    }
    for group in interface.groups:
        missing = [n for n in (group.spectrum, group.entries, group.scaling) if n not in parameters]
        yield from (f"{name}: missing" for name in missing)
        if missing:
            continue
        entries, count = parameters[group.entries], len(group.layers)
        n = parameters[group.spectrum].shape[-1:]
        known[group.spectrum] = group.dtype, (count, *n)
        known[group.entries] = "int64", (*n, 2)
        known[group.scaling] = "float32", (count,)
        if n == (0,):
            yield f"{group.spectrum}: no coefficients"
        fits = entries.dtype.kind == "i" and entries.shape[-1:] == (2,)
        if fits and ((entries < 0) | (entries >= np.array(group.shape))).any():
            yield f"{group.entries}: entries outside {list(group.shape)}"
    yield from (f"{name}: missing" for name in interface.not_brought(parameters))
    for name, array in parameters.items():
        if name not in known:
            yield f"{name}: no such input"
            continue
        dtype, shape = known[name]
        if array.dtype.kind != "i" and not np.isfinite(array.astype(np.float32)).all():
            yield f"{name}: NaN or infinity"
        if array.dtype.name != dtype or array.shape != shape:
            yield (
                f"{name}: {dtype} {list(shape)} expected, "
                f"found {array.dtype.name} {list(array.shape)}"
            )


def spectral_feeds(groups: Iterable[Group], bundle: Bundle) -> dict[str, Array]:
    """What a bound adapter with the graph's names feeds; layers that it lacks get zeros."""
    feeds: dict[str, Array] = {}
    for group in groups:
        spectra = {name: bundle.spectra[name] for name in group.layers if name in bundle.spectra}
        if not spectra:
            feeds |= base_feeds([group])
            continue
        entries, columns = _joined({name: bundle.entries(name) for name in spectra})
        spectrum = np.zeros((len(group.layers), len(entries)), group.dtype)
        scaling = np.zeros(len(group.layers), np.float32)
        for row, name in enumerate(group.layers):
            if name in spectra:
                spectrum[row, columns[name]] = spectra[name]
                scaling[row] = bundle.spec.scaling
        feeds |= {group.spectrum: spectrum, group.entries: entries, group.scaling: scaling}
    return feeds


def base_feeds(groups: Iterable[Group]) -> dict[str, Array]:
    """What makes no change: one coefficient of zero."""
    return {
        name: array
        for group in groups
        for name, array in (
            (group.spectrum, np.zeros((len(group.layers), 1), group.dtype)),
            (group.entries, np.zeros((1, 2), np.int64)),
            (group.scaling, np.zeros(len(group.layers), np.float32)),
        )
    }


def _joined(entries: Mapping[str, Array]) -> tuple[Array, dict[str, slice]]:
    """One list of entries for several layers, and where each finds its own in it.

    A shorter list that begins a longer one (same seed, smaller n) needs no extra room.
    """
    lists: list[Array] = []
    for own in sorted(entries.values(), key=len, reverse=True):
        if not any(np.array_equal(own, other[: len(own)]) for other in lists):
            lists.append(own)
    starts = np.cumsum([0, *(len(one) for one in lists)])
    places = {}
    for name, own in entries.items():
        which = next(i for i, one in enumerate(lists) if np.array_equal(own, one[: len(own)]))
        places[name] = slice(int(starts[which]), int(starts[which]) + len(own))
    return np.concatenate(lists).astype(np.int64), places


def table(groups: Iterable[Group], adapters: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The inputs of a bank: the feeds of each adapter, one above the other, n padded with zeros."""
    stacked: dict[str, Array] = {}
    names = {name for group in groups for name in (group.spectrum, group.entries)}
    for name in adapters[0]:
        arrays = [adapter[name] for adapter in adapters]
        if name in names:
            axis = 1 if name.startswith(f"{PREFIX}spectrum.") else 0
            longest = max(array.shape[axis] for array in arrays)
            arrays = [
                np.pad(a, [(0, (longest - a.shape[i]) * (i == axis)) for i in range(a.ndim)])
                for a in arrays
            ]
        stacked[name] = np.stack(arrays)
    return stacked
