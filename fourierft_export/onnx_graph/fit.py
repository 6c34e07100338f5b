"""What a bundle or an .onnx_adapter file feeds a graph, checked against the graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from ..bundle.file import Bundle
from ..bundle.fingerprint import judge
from ..bundle.spec import LayerSpec
from ..errors import BadInputError, BaseMismatchError
from ..models.names import find_bridge
from ..spectral.entries import current_rule, entries_sha256, spectral_entries
from ..types import Array
from .groups import Group, Interface, spectral_feeds

log = logging.getLogger(__name__)


def fit(
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
    not bring, are the base's.

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
    roots = {name.split(".")[0] for name in groups}
    bridge = find_bridge([layer.name for layer in bundle.layers], roots, groups.__contains__)
    wrong: list[str] = []
    others: list[str] = []
    layers: list[LayerSpec] = []
    for layer in bundle.layers:
        name = bridge.to_base(layer.name)
        group = groups.get(name)
        if group is None:
            wrong.append(f"{layer.name}: the graph has no adapter input for this layer")
        elif layer.shape not in (None, group.shape):
            wrong.append(f"{layer.name}: shape {list(group.shape)} expected, found {layer.shape}")
        elif layer.n_frequency > group.shape[0] * group.shape[1]:
            wrong.append(f"{layer.name}: n_frequency {layer.n_frequency} above its size")
        else:
            there = interface.fingerprints.get(name)
            if there and layer.fingerprint and judge(layer.fingerprint, there) == "different":
                others.append(f"{layer.name}: another weight than it was trained on")
            layers.append(_bound(bundle, replace(layer, name=name), group))
    saved: dict[str, Array] = {}
    known = {tensor.name: tensor for tensor in interface.saved}
    for tensor_name, array in bundle.saved.items():
        name = bridge.to_base(tensor_name)
        name = name if name in known else tensor_name
        if name in known and known[name].shape == array.shape:
            saved[name] = array
        elif name in known:
            expected = list(known[name].shape)
            wrong.append(f"{tensor_name}: shape {expected} expected, found {list(array.shape)}")
        elif bridge.strip and not tensor_name.startswith(f"{bridge.strip}."):
            log.warning("%s: this bare graph has no place for it; left out", tensor_name)
        else:
            wrong.append(f"{tensor_name}: the graph has no input for this tensor")
    missing = interface.not_brought(saved)
    wrong += [f"{name}: the base has none, and the adapter brings none" for name in missing]
    if not allow_base_mismatch:
        wrong += others
    if wrong:
        raise BaseMismatchError(
            where,
            expected="an adapter for this graph and its base",
            found=f"{len(wrong)} layers or tensors that do not fit",
            remedy="export the graph with an adapter that has these layers and tensors"
            if wrong != others
            else "give the graph of the adapter's own base, or allow_base_mismatch=True",
            offenders=wrong,
        )
    bound = Bundle(
        replace(bundle.spec, layers=tuple(layers)),
        {bridge.to_base(name): spectrum for name, spectrum in bundle.spectra.items()},
        saved,
        {bridge.to_base(name): entries for name, entries in bundle.explicit_entries.items()},
    )
    return full_feeds(interface, bound, base)


def knows_base(bundle: Bundle) -> bool:
    """Whether every layer tells the weight that it was trained on, so that `fit` checks it."""
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


def _bound(bundle: Bundle, layer: LayerSpec, group: Group) -> LayerSpec:
    if layer.is_bound:
        return layer
    rule = current_rule(group.shape)
    entries = spectral_entries(bundle.spec.entry_seed, group.shape, layer.n_frequency, rule)
    return replace(
        layer, shape=group.shape, entry_rule=rule, entries_sha256=entries_sha256(entries)
    )


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
