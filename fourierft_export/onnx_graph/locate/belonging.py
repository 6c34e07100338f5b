"""Do the adapters belong to a graph? What is looked for, what was found, bundles bound by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...bundle.file import Bundle
from ...bundle.fingerprint import fingerprint
from ...bundle.spec import LayerSpec
from ...errors import BaseMismatchError
from ...models.base import Base
from ...spectral.entries import current_rule, entries_sha256, spectral_entries
from ..graph.source import Source
from .finder import Found
from .site import Wanted


def wanted_layers(bundles: Mapping[str, Bundle], base: Base | None) -> list[Wanted]:
    """Every layer once, with all that any bundle or the base knows of it."""
    wanted: dict[str, Wanted] = {}
    for bundle in bundles.values():
        for layer in bundle.layers:
            if layer.name not in wanted or layer.fingerprint is not None:
                wanted[layer.name] = Wanted(
                    layer.name, layer.shape, layer.fan_in_fan_out, layer.fingerprint
                )
    if base is not None:
        # The base decides what is looked for; each bundle was bound to it, or is checked below.
        for name, there in base.layers(wanted).items():
            own = fingerprint(base.weight(name))
            wanted[name] = Wanted(name, there.shape, there.transposed, own)
    return list(wanted.values())


def judge(source: Source, found: Found, allow_base_mismatch: bool) -> tuple[str, ...]:
    """Notes on what was found.

    Args:
        source: the graph.
        found: the layers in it.
        allow_base_mismatch: let other values pass, never other shapes.

    Raises:
        BaseMismatchError: listing every layer that was not found, or is another weight.
    """
    offenders = [f"{layer}: {why}" for layer, why in found.missing.items()]
    verdicts = {layer: {site.verdict for site in sites} for layer, sites in found.sites.items()}
    names = {
        layer: sites[0].describe() if sites[0].quantised else sites[0].name
        for layer, sites in found.sites.items()
    }
    others = [layer for layer, verdict in verdicts.items() if "different" in verdict]
    if not allow_base_mismatch:
        offenders += [
            f"{name}: {names[name]} is another weight than the adapter's" for name in others
        ]
    if offenders:
        total = len(verdicts) + len(found.missing)
        raise BaseMismatchError(
            source.path,
            expected="the base that the adapter was trained on",
            found=f"{len(offenders)} of {total} layers that are not found or do not fit",
            remedy="give the base checkpoint (--base), or say where a weight is (--map "
            "LAYER=INITIALIZER)"
            if found.missing
            else "give the model of the base that the adapter belongs to, or pass "
            "--allow-base-mismatch if you know better",
            offenders=offenders,
        )
    notes = []
    if others:
        notes.append(f"{len(others)} weights are not those the adapter was trained on, as allowed")
    floats = [site for sites in found.sites.values() for site in sites if not site.quantised]
    if any(site.verdict == "precision" for site in floats):
        notes.append("the adapter was trained on this base in another precision")
    if any(None in verdict for verdict in verdicts.values()):
        notes.append("unbound layers: no check was possible that they belong to this model")
    shared = sorted({site.name for site in floats if site.shared})
    notes += [f"{name} is used elsewhere, too: that use keeps the base's weight" for name in shared]
    return tuple(notes)


def bound_to(bundle: Bundle, shapes: Mapping[str, tuple[int, int]]) -> Bundle:
    """A bundle with the shapes that the graph has.

    Raises:
        BaseMismatchError: listing the layers that are too small for it, or of another shape.
    """
    offenders = []
    layers: list[LayerSpec] = []
    for layer in bundle.layers:
        shape = shapes[layer.name]
        if layer.shape is not None and layer.shape != shape:
            offenders.append(
                f"{layer.name}: shape {list(layer.shape)} expected, found {list(shape)}"
            )
        elif layer.n_frequency > shape[0] * shape[1]:
            offenders.append(
                f"{layer.name}: n_frequency {layer.n_frequency} above the size of {list(shape)}"
            )
        elif layer.is_bound:
            layers.append(layer)
        else:
            rule = current_rule(shape)
            entries = spectral_entries(bundle.spec.entry_seed, shape, layer.n_frequency, rule)
            digest = entries_sha256(entries)
            layers.append(replace(layer, shape=shape, entry_rule=rule, entries_sha256=digest))
    if offenders:
        raise BaseMismatchError(
            "adapter",
            expected="layers as large as the adapter's",
            found=f"{len(offenders)} that are not",
            remedy="give the model of the base that the adapter belongs to",
            offenders=offenders,
        )
    return replace(bundle, spec=replace(bundle.spec, layers=tuple(layers)))
