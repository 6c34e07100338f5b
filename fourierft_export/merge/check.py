"""Do the bundles belong to this base? Every layer is looked at before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..bundle.file import Bundle
from ..bundle.fingerprint import compare
from ..bundle.spec import LayerSpec
from ..errors import BaseMismatchError
from ..models.base import Base, BaseLayer
from .changes import Ingredient

Progress = Callable[[str, int, int], None]


class Checked(NamedTuple):
    """A bundle that may be merged.

    Attributes:
        ingredient: the bundle, bound.
        verdict: "same", "precision", "mismatch" or "unbound", as in `report.BundleReport`.
        notes: what a person should know.
    """

    ingredient: Ingredient
    verdict: str
    notes: tuple[str, ...]


def check(
    base: Base,
    bundles: Sequence[tuple[str, Bundle, float]],
    *,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> tuple[Checked, ...]:
    """Bind unbound bundles to `base`, and compare bound ones with it.

    Args:
        base: what they shall be merged into.
        bundles: (how to speak of it, bundle, weight) each.
        allow_base_mismatch: let other values pass, never other shapes.
        progress: called with ("checking the base", bundles done, bundles in all).

    Raises:
        BaseMismatchError: listing the offending layers of all bundles.
    """
    checked = []
    offenders: list[str] = []
    only_values = True
    for number, (name, bundle, weight) in enumerate(bundles):
        if progress:
            progress("checking the base", number, len(bundles))
        at = f"{name}: " if len(bundles) > 1 else ""
        try:
            layers = base.layers([layer.name for layer in bundle.layers])
            bound = bundle if bundle.is_bound else bundle.bind(base)
        except BaseMismatchError as error:
            offenders += [f"{at}{line}" for line in error.offenders or (error.summary,)]
            only_values = False
            continue
        misfits = _misfits(bound, layers)
        verdicts = {} if misfits else _verdicts(bundle, base)
        others = [name for name, verdict in verdicts.items() if verdict == "different"]
        only_values &= not misfits
        offenders += [f"{at}{line}" for line in misfits]
        if not allow_base_mismatch:
            offenders += [f"{at}{other}: another weight than the adapter's" for other in others]
        bridge = base.bridge(layer.name for layer in bundle.layers)
        ingredient = Ingredient(name, bound, weight, layers, bridge)
        checked.append(Checked(ingredient, *_sum_up(name, verdicts, others)))
    if progress:
        progress("checking the base", len(bundles), len(bundles))
    if offenders:
        raise BaseMismatchError(
            base.directory,
            expected="the base that the adapter was trained on",
            found=f"{len(offenders)} layers that do not fit",
            remedy="give the base that the adapter belongs to"
            + (", or pass --allow-base-mismatch if you know better" if only_values else ""),
            offenders=offenders,
        )
    return tuple(checked)


def _misfits(bundle: Bundle, layers: Mapping[str, BaseLayer]) -> list[str]:
    """Layers of other shapes than the base's; nothing overrides these."""
    lines = []
    for layer in bundle.layers:
        there = layers[layer.name]
        if layer.shape != there.shape:
            lines.append(f"{layer.name}: shape {_sizes(layer)}, in the base {list(there.shape)}")
        elif layer.fan_in_fan_out != there.fan_in_fan_out:
            lines.append(f"{layer.name}: the base stores its weight the other way round")
    return lines


def _sizes(layer: LayerSpec) -> list[int]:
    return list(layer.shape or ())


def _verdicts(bundle: Bundle, base: Base) -> dict[str, str]:
    """Per layer that carries a fingerprint, what it says about the base's weight."""
    return {
        layer.name: compare(layer.fingerprint, base.weight(layer.name))
        for layer in bundle.layers
        if layer.fingerprint is not None
    }


def _sum_up(
    name: str, verdicts: Mapping[str, str], others: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """One verdict for a bundle, and the notes that go with it."""
    if not verdicts:
        note = f"{name} is unbound: no check was possible that it belongs to this base"
        return "unbound", (note,)
    if others:
        note = f"{name} was trained on another base in {len(others)} of {len(verdicts)} layers"
        return "mismatch", (f"{note}; merged all the same, as asked",)
    if "precision" in verdicts.values():
        return "precision", (f"{name} was trained on this base in another precision",)
    return "same", ()
