"""Writes a bundle as a PEFT LoRA adapter, for servers that know nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..errors import UsageError
from ..files import strict_json
from ..files.staging import check_output, staged_directory
from ..spectral.delta import Term, add_delta_weight
from ..spectral.singular import Float64, singular_values
from ..types import Array, Progress
from .bundle import Bundle
from .peft import CONFIG_FILE, PREFIX, WEIGHTS_FILE, BundleSource, open_bundle, peft_name
from .peft_config import config_of

_BIASES = {"fourier_only": "lora_only"}
# Fields that mean the same in PEFT's LoraConfig.
_COMMON = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class LoraLayer:
    """How well one layer was approximated.

    Attributes:
        name: of the layer.
        full_rank: rank of its delta_W: with this one nothing is lost.
        kept: share of |delta_W|^2 that the best approximation of the chosen rank keeps, from the
            singular values.
        measured: the same, from the float32 numbers that were written.
    """

    name: str
    full_rank: int
    kept: float
    measured: float


@dataclass(frozen=True)
class LoraReport:
    """What `to_lora` wrote.

    Attributes:
        directory: the PEFT adapter directory.
        rank: of all layers.
        kept: share of |delta_W|^2 over all layers that is kept, from the singular values.
        measured: the same, from the float32 numbers that were written.
        layers: the same for each layer.
    """

    directory: Path
    rank: int
    kept: float
    measured: float
    layers: tuple[LoraLayer, ...]

    @property
    def error(self) -> float:
        """Relative error of all delta_W: the root of the share that is lost, as measured."""
        return math.sqrt(max(0.0, 1.0 - self.measured))


def to_lora(
    bundle: BundleSource,
    directory: str | os.PathLike[str],
    *,
    rank: int | None = None,
    max_error: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> LoraReport:
    """Writes the best LoRA approximation of a bundle as a directory that PEFT loads.

    delta_W of few scattered coefficients has a high rank, so that a LoRA adapter of a usual rank
    keeps little of it: look at the report, and merge the bundle instead where that is possible.
    Heads and biases are kept whole. Torch is not needed.

    Args:
        bundle: a bound `Bundle`, or a path of one.
        directory: to write: adapter_config.json and adapter_model.safetensors.
        rank: of every layer; at most the smaller side of the largest layer.
        max_error: instead of `rank`: the smallest rank is taken by which the relative error
            |delta_W - B A| / |delta_W| over all layers is at most this.
        force: replace an existing directory.
        progress: called with the layers done.

    Returns:
        What is kept, for each layer and in all.

    Raises:
        UsageError: neither or both of rank and max_error, or one out of range; the directory
            exists, without `force`.
        BadInputError: the bundle is unbound or damaged.

    Example:
        >>> import fourierft_export as ff, tempfile, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> bundle = ff.capture(ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), config))
        >>> report = ff.to_lora(bundle, tempfile.mkdtemp() + "/lora", max_error=0.01)
        >>> report.rank <= 4 and report.kept > 0.9999
        True
    """
    _check_settings(rank, max_error)
    check_output(directory, force=force, inputs=(bundle,))
    opened = open_bundle(bundle, bind=True)
    most = max((min(layer.shape or (0, 0)) for layer in opened.layers), default=0)
    if rank is not None and opened.is_bound and rank > most:
        expected = f"a rank of at most {most}, the largest that a layer's delta_W can have"
        raise UsageError("LoRA", expected=expected, found=str(rank))
    scaling = float(opened.spec.scaling)
    terms = {
        name: Term(spectrum, opened.entries(name), scaling)
        for name, spectrum in opened.spectra.items()
    }
    found = []
    for done, layer in enumerate(opened.layers):
        found.append(singular_values(*terms[layer.name][:2], layer.shape or (0, 0), scaling))
        if progress:
            progress("decomposing layers", done + 1, len(opened.layers))
    energies = [one.energies for one in found]
    if rank is None:
        rank = _smallest_rank(energies, float(max_error or 0.0))
    tensors: dict[str, Array] = {
        f"{PREFIX}{peft_name(opened, name)}": array for name, array in opened.saved.items()
    }
    layers, lost = [], 0.0
    for layer, one, energy in zip(opened.layers, found, energies, strict=True):
        b, a = (np.ascontiguousarray(half, np.float32) for half in one.factors(rank))
        tensors |= {
            f"{PREFIX}{layer.name}.lora_A.weight": a,
            f"{PREFIX}{layer.name}.lora_B.weight": b,
        }
        # From the numbers written, by the transform that merges use.
        rest = add_delta_weight(-(b @ a), [terms[layer.name]])
        left = float(np.sum(rest.astype(np.float64) ** 2))
        lost += left
        total = float(energy[-1])
        kept = float(energy[min(rank, len(energy) - 1)])
        shares = (kept / total, 1 - left / total) if total else (1.0, 1.0)
        layers.append(LoraLayer(layer.name, len(one.values), *shares))
    config = strict_json.pretty(_lora_config(opened, rank))
    with staged_directory(directory, force=force) as folder:
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        (folder / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
    total = sum(float(energy[-1]) for energy in energies)
    kept = sum(float(energy[min(rank, len(energy) - 1)]) for energy in energies)
    shares = (kept / total, 1 - lost / total) if total else (1.0, 1.0)
    return LoraReport(Path(directory), rank, *shares, tuple(layers))


def _check_settings(rank: int | None, max_error: float | None) -> None:
    if (rank is None) == (max_error is None):
        found = "neither" if rank is None else "both"
        raise UsageError("LoRA", expected="a rank or a largest error (--max-error)", found=found)
    if rank is not None and rank < 1:
        raise UsageError("LoRA", expected="a rank of 1 or more", found=str(rank))
    if max_error is not None and not 0 < max_error < 1:
        raise UsageError("LoRA", expected="a largest error between 0 and 1", found=str(max_error))


def _smallest_rank(energies: Sequence[Float64], max_error: float) -> int:
    """The smallest rank by which the relative error over all layers is at most `max_error`."""
    longest = max(map(len, energies))
    padded = [np.pad(energy, (0, longest - len(energy)), "edge") for energy in energies]
    kept = np.sum(padded, axis=0)
    enough = np.flatnonzero(kept[-1] - kept <= max_error**2 * kept[-1])
    return max(1, int(enough[0]))


def _lora_config(bundle: Bundle, rank: int) -> dict[str, Any]:
    """The adapter_config.json of a LoRA adapter for the bundle's layers and saved tensors."""
    config = config_of(bundle.spec, bundle.saved)
    targets = {key: config[key] for key in _COMMON if key in bundle.spec.peft_config}
    if targets.get("target_modules") is None:
        targets = {"target_modules": [layer.name for layer in bundle.layers]}
    bias = str(config.get("bias", "none"))
    return {
        "base_model_name_or_path": bundle.spec.base_model,
        "bias": _BIASES.get(bias, bias),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in bundle.layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": config.get("modules_to_save"),
        "peft_type": "LORA",
        "r": rank,
        "task_type": bundle.spec.task_type,
        **targets,
    }
