"""Do the bundles belong to this base? Every layer is looked at before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..bundle.file import Bundle
from ..bundle.fingerprint import compare, fingerprint_of_samples, judge, sample_positions
from ..bundle.spec import LayerSpec
from ..errors import BaseMismatchError
from ..models.base import Base, BaseLayer
from ..types import Progress
from .changes import Ingredient


@dataclass(frozen=True)
class Checked:
    """A bundle that may be merged.

    Attributes:
        ingredient: the bundle, bound.
        sha256: of the bundle as it was given.
        verdicts: for each layer that came with a fingerprint, "same", "precision" or "different".
    """

    ingredient: Ingredient
    sha256: str
    verdicts: Mapping[str, str]

    def summary(self) -> tuple[str, tuple[str, ...]]:
        """One verdict, as in `report.BundleReport`, and the notes that go with it."""
        name, others = self.ingredient.name, self.others()
        if not self.verdicts:
            note = f"{name} is unbound: no check was possible that it belongs to this base"
            return "unbound", (note,)
        if others:
            count = f"{len(others)} of {len(self.verdicts)}"
            note = f"{name} was trained on another base in {count} layers"
            return "mismatch", (f"{note}; merged all the same, as asked",)
        if "precision" in self.verdicts.values():
            return "precision", (f"{name} was trained on this base in another precision",)
        return "same", ()

    def others(self) -> tuple[str, ...]:
        """The layers whose weight in the base is not the adapter's."""
        return tuple(name for name, verdict in self.verdicts.items() if verdict == "different")


def check(
    base: Base,
    bundles: Sequence[tuple[str, Bundle, float]],
    *,
    allow_base_mismatch: bool = False,
    thorough: bool = False,
    progress: Progress | None = None,
) -> tuple[Checked, ...]:
    """Bind unbound bundles to `base`, and compare bound ones with it.

    Every layer is there and has the right shape before anything is written. Of the values only the
    eight samples in each fingerprint are compared here; the hashes are compared when the weights
    are read for the merge (`settle`), or here when `thorough`.

    Args:
        base: what they shall be merged into.
        bundles: (how to speak of it, bundle, weight) each.
        allow_base_mismatch: let other values pass, never other shapes.
        thorough: read and hash the weights.
        progress: called with ("checking the base", bundles done, bundles in all).

    Raises:
        BaseMismatchError: listing the offending layers of all bundles.
    """
    checked = []
    misfits: list[str] = []
    for number, (name, bundle, weight) in enumerate(bundles):
        if progress:
            progress("checking the base", number, len(bundles))
        at = f"{name}: " if len(bundles) > 1 else ""
        try:
            bound = bundle if bundle.is_bound else bundle.bind(base)
            ingredient = prepared(base, name, bound, weight)
        except BaseMismatchError as error:
            misfits += [f"{at}{line}" for line in error.offenders or (error.summary,)]
            continue
        wrong = _misfits(bound, ingredient.layers)
        misfits += [f"{at}{line}" for line in wrong]
        verdicts = {} if wrong else _verdicts(bundle, base, thorough)
        checked.append(Checked(ingredient, bundle.sha256, verdicts))
    if progress:
        progress("checking the base", len(bundles), len(bundles))
    refuse_others(base, checked, allow_base_mismatch, misfits)
    return tuple(checked)


def prepared(base: Base, name: str, bundle: Bundle, weight: float) -> Ingredient:
    """A bound bundle with where its layers lie in a base.

    Raises:
        BaseMismatchError: listing the layers that the base does not have.
    """
    modules = [layer.name for layer in bundle.layers]
    return Ingredient(name, bundle, weight, base.layers(modules), base.bridge(modules))


def settle(
    base: Base,
    checked: Sequence[Checked],
    found: Sequence[Mapping[str, str]],
    allow_base_mismatch: bool,
) -> tuple[Checked, ...]:
    """`checked` with the verdicts of the hashes, taken while the weights were read.

    Args:
        base: for errors.
        checked: of `check`.
        found: for each bundle, verdicts by layer.
        allow_base_mismatch: as for `check`.

    Raises:
        BaseMismatchError: listing the offending layers of all bundles.
    """
    settled = tuple(
        replace(item, verdicts={name: now.get(name, old) for name, old in item.verdicts.items()})
        for item, now in zip(checked, found, strict=True)
    )
    refuse_others(base, settled, allow_base_mismatch)
    return settled


def refuse_others(
    base: Base, checked: Sequence[Checked], allow_base_mismatch: bool, misfits: Sequence[str] = ()
) -> None:
    """Raise if there are misfits, or layers with another weight that are not allowed.

    Raises:
        BaseMismatchError: listing all of them.
    """
    others = [
        (f"{item.ingredient.name}: " if len(checked) > 1 else "")
        + f"{other}: another weight than the adapter's"
        for item in checked
        for other in item.others()
        if not allow_base_mismatch
    ]
    if misfits or others:
        raise BaseMismatchError(
            base.directory,
            expected="the base that the adapter was trained on",
            found=f"{len(misfits) + len(others)} layers that do not fit",
            remedy="give the base that the adapter belongs to"
            + ("" if misfits else ", or pass --allow-base-mismatch if you know better"),
            offenders=[*misfits, *others],
        )


def _misfits(bundle: Bundle, layers: Mapping[str, BaseLayer]) -> list[str]:
    """Layers of other shapes than the base's; nothing overrides these."""
    lines = []
    for layer in bundle.layers:
        there = layers[layer.name]
        if layer.shape != there.shape:
            lines.append(f"{layer.name}: shape {_sizes(layer)}, in the base {list(there.shape)}")
        elif layer.fan_in_fan_out != there.transposed:
            lines.append(f"{layer.name}: the base stores its weight the other way round")
    return lines


def _sizes(layer: LayerSpec) -> list[int]:
    return list(layer.shape or ())


def _verdicts(bundle: Bundle, base: Base, thorough: bool) -> dict[str, str]:
    """Per layer that carries a fingerprint, what it says about the base's weight."""
    verdicts: dict[str, str] = {}
    tensors = base.layers([layer.name for layer in bundle.layers])
    for layer in bundle.layers:
        if layer.fingerprint is None:
            continue
        tensor = tensors[layer.name].tensor
        if thorough:
            verdicts[layer.name] = compare(layer.fingerprint, base.checkpoint.read(tensor))
            continue
        positions = sample_positions(prod(base.tensors[tensor].shape))
        values = base.checkpoint.read_elements(tensor, positions)
        found = fingerprint_of_samples(layer.fingerprint, values)
        verdicts[layer.name] = judge(layer.fingerprint, found)
    return verdicts
