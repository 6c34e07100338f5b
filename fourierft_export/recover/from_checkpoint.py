"""`recover_bundle`: the adapter back out of a merged checkpoint, by comparing it with its base."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.file import Bundle
from ..bundle.names import natural_key
from ..bundle.spec import AdapterSpec, LayerSpec
from ..errors import BaseMismatchError, ValidationError
from ..merge.asked import asked_for
from ..merge.others import other_changes
from ..models.base import Base, BaseLayer, open_base
from ..models.task import likely_task
from ..spectral.delta import Term
from ..spectral.entries import spectral_entries
from ..types import Array, Progress
from .spectrum import Fit, fit, spectrum_of

MOST_RESIDUAL = 1.5
LEAST_SIGNAL = 4.0
UNCERTAIN = 0.1


@dataclass(frozen=True)
class RecoveredLayer:
    """One layer whose spectrum was recovered.

    Attributes:
        name: module path.
        dtype: safetensors dtype of its merged weight.
        changed: share of its weights that differ from the base's.
        residual: what the spectrum leaves of the difference, relative to what rounding leaves.
        uncertainty: expected relative error of the spectrum, from that rounding.
    """

    name: str
    dtype: str
    changed: float
    residual: float
    uncertainty: float


@dataclass(frozen=True)
class RecoverReport:
    """What `recover_bundle` found.

    Attributes:
        layers: in natural order of their names.
        saved: dense tensors that came along (heads, biases).
        notes: what a person should know.
    """

    layers: tuple[RecoveredLayer, ...]
    saved: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; numbers that are not finite become None."""
        fields = asdict(self)
        for layer in fields["layers"]:
            layer.update({k: None for k, v in layer.items() if v in (math.inf, -math.inf)})
        return fields


def recover_bundle(
    base: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    *,
    like: Bundle | None = None,
    seed: int | None = None,
    n_frequency: int | None = None,
    targets: Sequence[str] = (),
    scaling: float | None = None,
    entry_rule: str | None = None,
    allow_links: bool = False,
    progress: Progress | None = None,
) -> tuple[Bundle, RecoverReport]:
    """The bundle whose merge into `base` gives `merged`.

    What is added to a weight tells the product of spectrum and scaling, and of two entries that
    mirror each other the sum: they get equal shares.

    Args:
        base: the checkpoint that was merged into.
        merged: the checkpoint that came out.
        like: a bundle of the same layers, entries and scaling; else the next three are needed.
        seed: of the entries.
        n_frequency: coefficients of each layer.
        targets: layers, by their full paths or the ends of them ("q_proj").
        scaling: what to divide by; 150 by default, without `like`.
        entry_rule: "small" or "r64", for adapters trained with an older torch; not with a bound
            `like`, which tells it.
        allow_links: follow links between files of the checkpoints' folders.
        progress: called with ("recovering", bytes done, bytes in all).

    Returns:
        The bundle, bound to `base`, and how well it explains the difference.

    Raises:
        UsageError: neither a `like` nor the rest, or both; no layer of these names.
        BaseMismatchError: layers that one of the checkpoints lacks, or of other shapes.
        ValidationError: the difference is not that of a FourierFT adapter with these entries, or
            other weights changed too; all offenders listed.
        FileAccessError, BadInputError: of the checkpoints.
    """
    before, after = (open_base(path, allow_links=allow_links) for path in (base, merged))
    spec = asked_for(after, like, seed, n_frequency, targets, scaling, entry_rule)
    names = [layer.name for layer in spec.layers]
    pairs = _paired(before, after, names)
    total = sum(info.nbytes for info in before.tensors.values())
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("recovering", min(done, total), total)

    spectra: dict[str, Array] = {}
    found: dict[str, Fit] = {}
    for layer in spec.layers:
        entries = _entries(layer, spec, pairs[layer.name][0], like, entry_rule)
        scale = float(spec.scaling)
        values, found[layer.name] = _recovered(before, after, *pairs[layer.name], entries, scale)
        dtype = like.spectra[layer.name].dtype if like is not None else np.dtype(np.float32)
        spectra[layer.name] = values.astype(dtype)
        count(before.tensors[pairs[layer.name][0].tensor].nbytes)
    merged_tensors = {there.tensor for _, there in pairs.values()}
    wanted = None if like is None else tuple(like.saved)
    saved, changed = other_changes(before, after, names, merged_tensors, wanted, count)
    _refuse(after.directory, found, changed)
    if like is None and saved:  # what has a head is of the task that the merged model is for
        task = likely_task(after.config, None)
        spec = replace(spec, task_type=task.peft_type if task else None)
    bundle = Bundle.build(
        spec, spectra, saved, like.explicit_entries if like else {}, where=os.fspath(merged)
    ).bind(before, entry_rule)
    layers = tuple(
        RecoveredLayer(
            name,
            after.tensors[pairs[name][1].tensor].dtype,
            found[name].changed,
            found[name].residual,
            found[name].uncertainty,
        )
        for name in sorted(names, key=natural_key)
    )
    return bundle, RecoverReport(layers, tuple(saved), _notes(layers))


def _paired(
    before: Base, after: Base, names: Sequence[str]
) -> dict[str, tuple[BaseLayer, BaseLayer]]:
    """The layers in both checkpoints.

    Raises:
        BaseMismatchError: layers that are absent, or of different shapes; all listed.
    """
    there, here = before.layers(names), after.layers(names)
    misfits = [
        f"{name}: {list(there[name].shape)} in the base, {list(here[name].shape)} merged"
        for name in names
        if there[name].shape != here[name].shape or there[name].transposed != here[name].transposed
    ]
    if misfits:
        raise BaseMismatchError(
            after.directory,
            expected=f"weights of the shapes that {before.directory} has",
            found=f"{len(misfits)} others",
            remedy="give the base that it was merged from",
            offenders=misfits,
        )
    return {name: (there[name], here[name]) for name in names}


def _entries(
    layer: LayerSpec, spec: AdapterSpec, there: BaseLayer, like: Bundle | None, rule: str | None
) -> Array:
    if like is not None and layer.is_bound:
        if layer.shape != there.shape:
            raise BaseMismatchError(
                f"layer {layer.name}",
                expected=f"shape {list(layer.shape or ())}, as the bundle has it",
                found=f"{list(there.shape)}",
                remedy="give a bundle of this base",
            )
        return like.entries(layer.name)
    return spectral_entries(
        spec.entry_seed, there.shape, layer.n_frequency, layer.entry_rule or rule
    )


def _recovered(
    before: Base, after: Base, there: BaseLayer, here: BaseLayer, entries: Array, scaling: float
) -> tuple[Array, Fit]:
    """The spectrum of one layer, and how well it explains the difference."""
    weight = before.checkpoint.read(there.tensor)
    result = after.checkpoint.read(here.tensor)
    stored = entries[:, ::-1] if there.transposed else entries
    spectrum = spectrum_of(weight, result, stored, scaling)
    return spectrum, fit(weight, result, Term(spectrum, stored, scaling))


def _refuse(where: Path, found: Mapping[str, Fit], changed: Sequence[str]) -> None:
    """Raise unless every layer's difference is a FourierFT delta, and nothing else changed."""
    offenders = [f"{name}: {why}" for name, one in found.items() if (why := _objection(one))]
    if not any(one.changed for one in found.values()):
        offenders = [f"{name}: as in the base" for name in found]
    offenders += [f"{name}: changed, but no layer of the adapter" for name in changed]
    if offenders:
        raise ValidationError(
            where,
            expected="a base to which a FourierFT adapter with these entries was added",
            found=f"{len(offenders)} weights whose change is none of that kind",
            remedy="check base, seed, n_frequency and targets",
            offenders=offenders,
        )


def _objection(one: Fit) -> str:
    """Why a difference is no FourierFT delta; nothing if it may be one."""
    if not one.changed:
        return ""
    if one.residual > MOST_RESIDUAL:
        return f"the difference leaves {one.residual:.3g} times what rounding leaves"
    if one.far:
        return f"{one.far} elements are further off than rounding explains"
    if one.signal < LEAST_SIGNAL:
        return "the difference lies no more in these entries than in others"
    return ""


def _notes(layers: Sequence[RecoveredLayer]) -> tuple[str, ...]:
    notes = []
    same = [layer for layer in layers if not layer.changed]
    if same:
        notes.append(f"{len(same)} of {len(layers)} layers are as in the base: their spectra are 0")
    vague = [x for x in layers if x.changed and x.uncertainty > UNCERTAIN]
    if vague:
        worst = max(vague, key=lambda layer: layer.uncertainty)
        notes.append(
            f"in {len(vague)} of {len(layers)} layers rounding to {worst.dtype} has blurred the "
            f"spectrum (worst: {worst.name}, by about {worst.uncertainty:.0%})"
        )
    return tuple(notes)
