"""`recover_bundle`: finds the adapter in a merged checkpoint, by comparing it with its base."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.file import Bundle
from ..bundle.fit import check_fits, fit_adapter, layers_of_base
from ..bundle.layer_templates import natural_key
from ..bundle.peft import BundleSource, open_bundle
from ..bundle.spec import AdapterSpec, LayerSpec
from ..errors import UsageError, ValidationError
from ..files.dtypes import FLOAT_DTYPES
from ..models.base import Base, open_base
from ..models.task import likely_task
from ..spectral.delta import Term
from ..spectral.entries import spectral_entries
from ..types import Array, Progress, byte_counter
from .other_tensors import compare_other_tensors
from .spectrum import RecoveredLayer, compute_spectrum, judge_spectrum

DEFAULT_SCALING = 150.0
UNCERTAIN = 0.1


@dataclass(frozen=True)
class RecoverReport:
    """What `recover_bundle` found.

    Attributes:
        layers: in natural order of their names.
        saved: names of the dense tensors in the bundle (heads, biases).
        notes: what a person should know.
    """

    layers: tuple[RecoveredLayer, ...]
    saved: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; numbers that are not finite become None."""
        fields = asdict(self)
        for layer in fields["layers"]:
            del layer["objection"]  # there is none, or it was raised
            layer.update({k: None for k, v in layer.items() if v in (math.inf, -math.inf)})
        return fields


def recover_bundle(
    base: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    *,
    like: BundleSource | None = None,
    seed: int | None = None,
    n_frequency: int | None = None,
    targets: Sequence[str] = (),
    scaling: float | None = None,
    entry_rule: str | None = None,
    allow_links: bool = False,
    progress: Progress | None = None,
) -> tuple[Bundle, RecoverReport]:
    """Finds the bundle whose merge into `base` gives `merged`.

    The difference of two weights determines the product of spectrum and scaling, and the sum of
    two entries that mirror each other, which get equal shares.

    Args:
        base: the checkpoint that was merged into.
        merged: the checkpoint that came out.
        like: a bundle (or its path) of the same layers, entries and scaling; without
            it, `seed`, `n_frequency` and `targets` are needed.
        seed: of the entries.
        n_frequency: coefficients of each layer.
        targets: layers, by their full paths or the ends of them ("q_proj").
        scaling: what to divide by; 150 by default, without `like`.
        entry_rule: "small" or "r64", for adapters trained with an older torch; not with a bound
            `like`, which has it.
        allow_links: follow links between files of the checkpoints' folders.
        progress: called with ("recovering", bytes done, bytes in all).

    Returns:
        The bundle, bound to `base`, and how well it explains the difference.

    Raises:
        UsageError: neither a `like` nor the rest, or both; no layer of these names.
        BaseMismatchError: layers that one of the checkpoints lacks, or of other shapes.
        ValidationError: the difference is not that of a FourierFT adapter with these entries, or
            other weights changed too; all offenders listed.
        FileAccessError: a checkpoint that is missing or cannot be read.
        BadInputError: a checkpoint that is damaged.
    """
    before, after = (open_base(path, allow_links=allow_links) for path in (base, merged))
    like = None if like is None else open_bundle(like)
    if like is None:
        spec = _spec_of(after, seed, n_frequency, targets, scaling)
    else:
        rule = entry_rule if like.is_bound else None
        options = {"seed": seed, "n_frequency": n_frequency, "targets": targets or None}
        spec = _spec_like(like, options | {"scaling": scaling, "entry_rule": rule})
    scale = float(spec.scaling)
    if not math.isfinite(scale) or not scale:
        raise UsageError("scaling", expected="a finite number that is not 0", found=f"{scale}")
    names = [layer.name for layer in spec.layers]
    there, here = before.layers(names), after.layers(names)
    fit = fit_adapter(spec, layers_of_base(before, names), entry_rule=entry_rule)
    for name in names:
        if (here[name].shape, here[name].transposed) != (there[name].shape, there[name].transposed):
            line = f"{name}: {list(here[name].shape)} merged, {list(there[name].shape)} in the base"
            fit = replace(fit, misfits=(*fit.misfits, line))
    remedy = "give the base that it was merged from"
    check_fits(before.directory, [fit], allow_base_mismatch=None, remedy=remedy)
    spec = fit.spec
    total = sum(info.nbytes for info in before.tensors.values())
    count = byte_counter("recovering", total, progress)
    spectra: dict[str, Array] = {}
    layers = []
    for layer in sorted(spec.layers, key=lambda one: natural_key(one.name)):
        name, shape = layer.name, there[layer.name].shape
        if like is not None and like.is_bound:
            entries = like.entries(name)
        else:
            rule = layer.entry_rule
            entries = spectral_entries(spec.entry_seed, shape, layer.n_frequency, rule)
        stored = entries[:, ::-1] if there[name].transposed else entries
        weight = before.checkpoint.read(there[name].tensor)
        result = after.checkpoint.read(here[name].tensor)
        values = compute_spectrum(weight, result, stored, scale)
        layers.append(judge_spectrum(name, weight, result, Term(values, stored, scale)))
        spectra[name] = values.astype(like.spectra[name].dtype if like else np.float32)
        count(weight.nbytes)
    adapted = {layer.tensor for layer in here.values()}
    wanted = None if like is None else tuple(like.saved)
    saved, changed = compare_other_tensors(before, after, names, adapted, wanted, count)
    _refuse(after.directory, layers, changed)
    if like is None and saved:  # an adapter with a head has the task of the merged model
        task = likely_task(after.config, None)
        spec = replace(spec, task_type=task.peft_type if task else None)
    explicit = like.explicit_entries if like else {}
    bundle = Bundle.build(spec, spectra, saved, explicit, where=os.fspath(merged))
    return bundle, RecoverReport(tuple(layers), tuple(saved), _notes(layers))


def _spec_like(like: Bundle, options: Mapping[str, Any]) -> AdapterSpec:
    """Return the spec of `like`; an error if options give what it has."""
    both = [name for name, value in options.items() if value is not None]
    if both:
        raise UsageError(
            "recover",
            expected="a bundle to be like, or seed, n_frequency and targets",
            found=f"both: {', '.join(both)}",
            remedy="leave these out: the bundle has them",
        )
    return like.spec


def _spec_of(
    after: Base, seed: int | None, n_frequency: int | None, targets: Sequence[str],
    scaling: float | None,
) -> AdapterSpec:  # fmt: skip
    """Make the spec of an adapter over the layers of `after` that `targets` names."""
    if seed is None or n_frequency is None or not targets:
        raise UsageError(
            "recover",
            expected="a bundle to be like (--like), or --seed, --n-frequency and --targets",
            found="neither",
        )
    modules = [
        name.removesuffix(".weight")
        for name, info in after.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOAT_DTYPES
    ]
    chosen = [m for m in modules if any(m == t or m.endswith(f".{t}") for t in targets)]
    if not chosen:
        raise UsageError(
            "targets",
            expected="the names of linear layers",
            found=f"none of {len(modules)} that end in {', '.join(targets)}",
            remedy=f"there are, for example: {', '.join(modules[:3])}",
        )
    layers = tuple(LayerSpec(name, n_frequency) for name in chosen)
    return AdapterSpec(seed, DEFAULT_SCALING if scaling is None else scaling, layers)


def _refuse(where: Path, layers: Sequence[RecoveredLayer], changed: Sequence[str]) -> None:
    """Raise unless every layer's difference is a FourierFT delta, and nothing else changed."""
    offenders = [f"{layer.name}: {layer.objection}" for layer in layers if layer.objection]
    if not any(layer.changed for layer in layers):
        offenders = [f"{layer.name}: equal to the base's weight" for layer in layers]
    offenders += [f"{name}: changed, but not a layer of the adapter" for name in changed]
    if offenders:
        raise ValidationError(
            where,
            expected="a base to which a FourierFT adapter with these entries was added",
            found=f"{len(offenders)} weights that were not changed in this way",
            remedy="check base, seed, n_frequency and targets",
            offenders=offenders,
        )


def _notes(layers: Sequence[RecoveredLayer]) -> tuple[str, ...]:
    notes = []
    same = [layer for layer in layers if not layer.changed]
    if same:
        count = f"{len(same)} of {len(layers)} layers"
        notes.append(f"{count} have the weights of the base: their spectra are 0")
    vague = [x for x in layers if x.changed and x.uncertainty > UNCERTAIN]
    if vague:
        worst = max(vague, key=lambda layer: layer.uncertainty)
        notes.append(
            f"in {len(vague)} of {len(layers)} layers rounding to {worst.dtype} has blurred the "
            f"spectrum (worst: {worst.name}, by about {worst.uncertainty:.0%})"
        )
    return tuple(notes)
