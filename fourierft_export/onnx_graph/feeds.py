"""What an adapter feeds the inputs of a graph, checked against the graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np

from ..bundle.file import Bundle
from ..bundle.fingerprint import compare_fingerprints
from ..bundle.fit import FoundLayer, FoundTensor, LayerVerdict, check_fits, fit_by_names
from ..bundle.spec import Fingerprint
from ..errors import BadInputError, BaseMismatchError
from ..types import Array
from .interface import PREFIX, Group, Interface

log = logging.getLogger(__name__)


def feed_bundle(
    interface: Interface,
    bundle: Bundle,
    base: Mapping[str, Array],
    *,
    where: str = "adapter",
    allow_base_mismatch: bool = False,
) -> dict[str, Array]:
    """What a bundle feeds a graph, checked against it.

    Layer names may differ by one leading segment, as in `attach`. An unbound bundle takes its
    shapes from the graph. Layers that the adapter does not change, and saved tensors that it does
    not have, are the base's.

    Args:
        interface: of the graph.
        bundle: the adapter.
        base: the base's saved tensors by name.
        where: what to name in errors.
        allow_base_mismatch: accept base weights other than those it was trained on.

    Returns:
        Input name -> array, for every input of the interface.

    Raises:
        BaseMismatchError: layers or tensors that the graph lacks or has in other shapes, tensors
            that neither base nor adapter has, another base: all of them listed.
    """
    groups = interface.layers
    inputs = {tensor.name: tensor for tensor in interface.saved}

    def layer_at(path: str) -> FoundLayer | str:
        group, known = groups.get(path), interface.fingerprints.get(path)
        if group is None:
            return "the graph has no adapter input for this layer"
        return FoundLayer(group.shape, compare=_comparing(known) if known else None)

    found, paths, names = fit_by_names(
        bundle.spec,
        bundle.saved,
        groups,
        layer_at,
        lambda name: FoundTensor(inputs[name].shape) if name in inputs else None,
        "graph",
    )
    saved = {to: bundle.saved[name] for name, to in names.items()}
    missing = [
        f"{name}: neither the base nor the adapter has one" for name in interface.not_brought(saved)
    ]
    check_fits(
        where,
        [replace(found, misfits=(*found.misfits, *missing))],
        allow_base_mismatch=allow_base_mismatch,
        remedy="export the graph with an adapter that has these layers and tensors, for its base",
    )
    layers = tuple(replace(one, name=paths[one.name]) for one in found.spec.layers)
    bound = Bundle(
        replace(found.spec, layers=layers),
        {paths[name]: spectrum for name, spectrum in bundle.spectra.items()},
        saved,
        {paths[name]: entries for name, entries in bundle.explicit_entries.items()},
    )
    return full_feeds(interface, bound, base)


def _comparing(there: Fingerprint) -> Callable[[Fingerprint], LayerVerdict]:
    return lambda expected: compare_fingerprints(expected, there)


def has_fingerprints(bundle: Bundle) -> bool:
    """Whether every layer has a fingerprint of its base weight, which `feed_bundle` compares."""
    return all(layer.fingerprint is not None for layer in bundle.layers)


def full_feeds(interface: Interface, bundle: Bundle, base: Mapping[str, Array]) -> dict[str, Array]:
    """Everything that a bound bundle with the graph's names feeds.

    Raises:
        BaseMismatchError: it lacks saved tensors that the base does not have either.
    """
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
        saved.name: _as_dtype(bundle.saved.get(saved.name, base[saved.name]), saved.dtype)
        for saved in interface.saved
    }


def _as_dtype(array: Array, dtype: str) -> Array:
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def check_parameters(interface: Interface, parameters: Mapping[str, Array], where: str) -> None:
    """Refuse parameters (of an .onnx_adapter file) that the graph cannot take.

    Raises:
        BadInputError: unknown or missing names, other dtypes or sizes, no coefficients, values
            that are not finite, entries outside their layer: all of them listed.
    """
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
    """What a bound adapter feeds the groups' inputs; layers that it lacks get zeros.

    Args:
        groups: of the graph.
        bundle: bound, with the graph's layer names.
    """
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
    """The inputs of a bank: those of each adapter, one above the other, n filled up with zeros.

    Args:
        groups: of the graph.
        adapters: per row its feeds by name, at least one.
    """
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
