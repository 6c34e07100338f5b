"""`recover_bundle`: finds the adapter in a merged checkpoint, by comparing it with its base."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.fit import check_fits, fit_adapter, layers_of_base
from ..bundle.layer_templates import natural_key
from ..bundle.peft import BundleSource, open_bundle
from ..bundle.spec import AdapterSpec, LayerSpec
from ..errors import UsageError, ValidationError
from ..files.dtypes import FLOAT_DTYPES, to_numpy
from ..files.safetensors_reader import TensorInfo
from ..models.base_tensors import Base, open_base
from ..models.task import HEAD_PARTS, head_labels, likely_task
from ..spectral.delta import Term
from ..types import Array, Progress, byte_counter
from .spectrum import RecoveredLayer, compute_spectrum, judge_spectrum

DEFAULT_SCALING = 150.0
UNCERTAIN = 0.1


@dataclass(frozen=True)
class RecoverReport:
    """What `recover_bundle` found."""

    layers: tuple[RecoveredLayer, ...]  # in natural order of their names
    saved: tuple[str, ...]  # names of the dense tensors in the bundle (heads, biases)
    notes: tuple[str, ...]  # what a person should know

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
    if like is None:
        template = _make_template(after, seed, n_frequency, targets, scaling)
    else:
        template = open_bundle(like)
        rule = entry_rule if template.is_bound else None
        options = ("seed", "n_frequency", "targets", "scaling", "entry_rule")
        given = (seed, n_frequency, targets or None, scaling, rule)
        both = [name for name, value in zip(options, given, strict=True) if value is not None]
        if both:
            raise UsageError(
                "recover",
                expected="a bundle to be like, or seed, n_frequency and targets",
                found=f"both: {', '.join(both)}",
                remedy="leave these out: the bundle has them",
            )
    scale = float(template.spec.scaling)
    if not math.isfinite(scale) or not scale:
        raise UsageError("scaling", expected="a finite number that is not 0", found=f"{scale}")
    names = sorted(template.spectra, key=natural_key)
    there, here = before.layers(names), after.layers(names)
    fit = fit_adapter(template.spec, layers_of_base(before, names), entry_rule=entry_rule)
    for name in names:
        if (here[name].shape, here[name].transposed) != (there[name].shape, there[name].transposed):
            line = f"{name}: {list(here[name].shape)} merged, {list(there[name].shape)} in the base"
            fit = replace(fit, misfits=(*fit.misfits, line))
    remedy = "give the base that it was merged from"
    check_fits(before.directory, [fit], allow_base_mismatch=None, remedy=remedy)
    template = replace(template, spec=fit.spec)
    total = sum(info.nbytes for info in before.tensors.values())
    count = byte_counter("recovering", total, progress)
    spectra: dict[str, Array] = {}
    layers = []
    for name in names:
        entries = template.entries(name)
        stored = entries[:, ::-1] if there[name].transposed else entries
        weight = before.checkpoint.read(there[name].tensor)
        result = after.checkpoint.read(here[name].tensor)
        values = compute_spectrum(weight, result, stored, scale)
        layers.append(judge_spectrum(name, weight, result, Term(values, stored, scale)))
        spectra[name] = values.astype(template.spectra[name].dtype)
        count(weight.nbytes)
    adapted = {layer.tensor for layer in here.values()}
    wanted = None if like is None else {after.bridge(names).to_base(n): n for n in template.saved}
    saved, changed = _compare_other_tensors(before, after, adapted, wanted, count)
    _refuse(after.directory, layers, changed)
    spec = fit.spec
    if like is None and saved:  # an adapter with a head has the task of the merged model
        task = likely_task(after.config, None)
        spec = replace(spec, task_type=task.peft_type if task else None)
    bundle = Bundle.build(spec, spectra, saved, template.explicit_entries, where=os.fspath(merged))
    notes = _notes(layers)
    absent = sorted(template.saved.keys() - saved)
    if absent:
        notes.append(f"not in {after.directory}, and so not in the bundle: {', '.join(absent)}")
    return bundle, RecoverReport(tuple(layers), tuple(saved), tuple(notes))


def _make_template(
    after: Base, seed: int | None, n_frequency: int | None, targets: Sequence[str],
    scaling: float | None,
) -> Bundle:  # fmt: skip
    """Make a bundle with empty spectra for the layers of `after` that `targets` names."""
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
    spec = AdapterSpec(seed, DEFAULT_SCALING if scaling is None else scaling, layers)
    return Bundle(spec, dict.fromkeys(chosen, np.zeros(n_frequency, np.float32)), {}, {})


def _compare_other_tensors(
    before: Base,
    after: Base,
    layers: Collection[str],
    wanted: Mapping[str, str] | None,
    count: Callable[[int], None],
) -> tuple[dict[str, Array], list[str]]:
    """Find every tensor that differs from the base's, but for the adapted weights.

    Args:
        before, after: the base and the merged checkpoint.
        layers: the adapted weights, by their names in `after`.
        wanted: names in `after` of the adapter's dense tensors -> the adapter's names; None to
            take heads, biases and tensors that the base does not have.
        count: called with the bytes of the base's tensors that were compared.

    Returns:
        The dense tensors of the adapter, and the names of all others that changed.
    """
    weights = [name.removesuffix(".weight") for name in before.tensors if name.endswith(".weight")]
    to_after = after.bridge(weights)
    compared = set(layers)
    saved: list[str] = []
    changed: list[str] = []
    for name, info in before.tensors.items():
        there = name if name in after.tensors else to_after.to_base(name)
        if there in layers:
            continue
        compared.add(there)
        if there not in after.tensors:
            if info.dtype in FLOAT_DTYPES:  # position numbers and the like are often left out
                changed.append(f"{name} (absent)")
        elif wanted is not None and there in wanted:
            saved.append(there)
        elif not _is_same(before, info, after, after.tensors[there]):
            # PEFT saves biases and heads with the spectra.
            is_bias = len(info.shape) == 1 and there.endswith(".bias")
            is_head = head_labels({there: info.shape}) is not None or HEAD_PARTS & {
                *there.split(".")
            }
            (saved if wanted is None and (is_bias or is_head) else changed).append(there)
        count(info.nbytes)
    for there in sorted(after.tensors.keys() - compared):
        if wanted is not None and there in wanted:
            saved.append(there)
        elif not _is_kept_output(before, after, there):
            (saved if wanted is None else changed).append(there)
    return {(wanted or {}).get(name, name): after.checkpoint.read(name) for name in saved}, changed


def _is_kept_output(before: Base, after: Base, name: str) -> bool:
    """Return whether a tensor is an output embedding that was tied in the base."""
    if not f".{name}".endswith(".lm_head.weight"):
        return False
    own = before.find([name.removesuffix(".weight")]).popitem()[1]
    if isinstance(own, str):
        return False
    return _is_same(before, before.tensors[own.tensor], after, after.tensors[name])


def _is_same(before: Base, mine: TensorInfo, after: Base, its: TensorInfo) -> bool:
    """Return whether two tensors are equal, after rounding to the merged one's dtype."""
    if mine.shape != its.shape:
        return False
    if mine.dtype == its.dtype:
        blocks = before.checkpoint.read_blocks(mine.name), after.checkpoint.read_blocks(its.name)
        return all(a == b for a, b in zip(*blocks, strict=True))
    if not {mine.dtype, its.dtype} <= {*FLOAT_DTYPES}:
        return False
    with np.errstate(over="ignore"):
        rounded = before.checkpoint.read(mine.name).astype(to_numpy(its.dtype))
    return rounded.tobytes() == after.checkpoint.read(its.name).tobytes()


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


def _notes(layers: Sequence[RecoveredLayer]) -> list[str]:
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
    return notes
