"""Rebuilds the adapted model from the definition: base + Re(ifft2(S)) * scaling in float64.

Nothing of `adapt` or `merge` is used, so that a fault there cannot hide here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..bundle.bundle import Bundle
from ..bundle.spec import EXPLICIT_RULE, LayerSpec
from ..errors import BaseMismatchError
from ..spectral.delta import reference_delta
from ..spectral.entries import current_rule, spectral_entries
from .models import find_module

if TYPE_CHECKING:
    import torch

Rounding = Mapping[str, "torch.dtype"]
"""Parameter name -> dtype its values are rounded to (and kept as float32)."""


@dataclass(frozen=True)
class Target:
    """A layer of the model that the adapter changes."""

    spec: LayerSpec  # of the adapter
    path: str  # of the module in this model
    module: Any  # whose `weight` is replaced
    weight: torch.Tensor  # the base's, as loaded
    transposed: bool  # the weight is (in, out), as in transformers' Conv1D

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        first, second = self.weight.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """The base's weight as (out_features, in_features)."""
        weight = self.weight.double().numpy()
        return weight.T if self.transposed else weight


def find_targets(model: torch.nn.Module, bundle: Bundle) -> list[Target]:
    """Finds the layers of `model` that the adapter names; raises for all that do not fit."""
    from transformers.pytorch_utils import Conv1D

    targets, offenders = [], []
    for spec in bundle.layers:
        path, module = find_module(model, spec.name)
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2:
            offenders.append(f"{spec.name}: no such linear layer in {type(model).__name__}")
            continue
        target = Target(spec, path, module, weight.detach(), isinstance(module, Conv1D))
        targets.append(target)
        if spec.shape is not None and spec.shape != target.shape:
            expected, found = list(spec.shape), list(target.shape)
            offenders.append(f"{spec.name}: shape {expected} expected, found {found}")
        elif spec.n_frequency > prod(target.shape):
            size = f"{spec.n_frequency} above the size of {target.shape}"
            offenders.append(f"{spec.name}: n_frequency {size}")
    if offenders:
        raise BaseMismatchError(
            "base",
            expected="the model that the adapter was trained on",
            found=f"{len(offenders)} of {len(bundle.layers)} layers that do not fit",
            remedy="give the base model that the adapter belongs to",
            offenders=offenders,
        )
    return targets


def put_saved(
    model: torch.nn.Module, bundle: Bundle, only: frozenset[str] | None = None
) -> tuple[str, ...]:
    """Puts the adapter's heads and biases into the model; raises for all that do not fit.

    Args:
        model: gets them.
        bundle: has them.
        only: names, as the model calls them, of those to put; default all.

    Returns:
        The names of the parameters that were set, as this model calls them.
    """
    import torch

    done, offenders = [], []
    for name, value in bundle.saved.items():
        owner, _, leaf = name.rpartition(".")
        path, module = find_module(model, owner)
        current = getattr(module, leaf, None)
        parameter = f"{path}.{leaf}".lstrip(".")
        if current is None:
            offenders.append(f"{name}: no such parameter in {type(model).__name__}")
        elif only is not None and parameter not in only:
            continue
        elif tuple(current.shape) != value.shape:
            found = f"{list(current.shape)} in the model"
            offenders.append(f"{name}: shape {list(value.shape)} against {found}")
        else:
            # A new parameter, since the old one may be shared (a tied head).
            tensor = torch.from_numpy(value.astype(np.float32))
            setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
            done.append(parameter)
    if offenders:
        raise BaseMismatchError(
            "base",
            expected="a model with a place for every tensor that the adapter saved",
            found=f"{len(offenders)} of {len(bundle.saved)} that do not fit",
            remedy="name the task that the adapter was trained for (task=..., --task)",
            offenders=offenders,
        )
    return tuple(done)


def delta_of(
    bundle: Bundle, target: Target, spectrum: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """Computes delta_W of one layer from its definition, or of another `spectrum`: float64."""
    spec = target.spec
    if spec.entry_rule == EXPLICIT_RULE:
        entries = bundle.entries(spec.name)
    else:
        rule = spec.entry_rule or current_rule(target.shape)
        entries = spectral_entries(bundle.spec.entry_seed, target.shape, spec.n_frequency, rule)
    spectrum = bundle.spectra[spec.name] if spectrum is None else spectrum
    return reference_delta(spectrum, entries, target.shape, float(bundle.spec.scaling))


def set_weights(
    targets: Sequence[Target], bundle: Bundle, rounding: Rounding, *, in_float32: bool = False
) -> None:
    """Gives every target the weight W + delta_W, rounded once.

    Args:
        targets: from `find_targets`; their `weight` stays the base's, so this can be repeated.
        bundle: the adapter.
        rounding: parameter name -> dtype; others stay float32.
        in_float32: add in float32 instead of float64, to measure what that alone changes.
    """
    import torch

    for target in targets:
        dtype = np.float32 if in_float32 else np.float64
        changed = target.matrix.astype(dtype) + delta_of(bundle, target).astype(dtype)
        changed = changed.T if target.transposed else changed
        tensor = torch.from_numpy(np.ascontiguousarray(changed.astype(np.float32)))
        tensor = _rounded(tensor, rounding.get(f"{target.path}.weight"))
        # Not in place: a tied embedding keeps the base's values, as in PEFT's unmerged forward.
        target.module.weight = torch.nn.Parameter(tensor, requires_grad=False)


def round_all(model: torch.nn.Module, rounding: Rounding) -> None:
    """Rounds every parameter in `rounding`, but not the weights that `Target` objects hold."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = _rounded(parameter.data, rounding.get(name))


def uniform_rounding(model: torch.nn.Module, precision: str) -> Rounding:
    """Maps every parameter to one precision ("float16" or "bfloat16")."""
    import torch

    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return dict.fromkeys(names, getattr(torch, precision))


def find_rounding(model: torch.nn.Module) -> Rounding:
    """Finds the parameters whose values all survive rounding to bfloat16 or float16.

    The values are compared because models are loaded as float32 whatever dtype their files have.
    """
    import torch

    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for dtype in (torch.float16, torch.bfloat16):  # bfloat16 where both hold
            if torch.equal(_rounded(parameter.data, dtype), parameter.data):
                found[name] = dtype
    return found


def weights_precision(model: torch.nn.Module, rounding: Rounding, paths: list[str]) -> str:
    """Finds the precision of most weights, by element: of those at `paths`, or of all matrices."""
    counts = Counter({"float32": 0})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.removesuffix(".weight") in paths if paths else parameter.ndim >= 2:
            dtype = str(rounding.get(name, "float32")).removeprefix("torch.")
            counts[dtype] += parameter.numel()
    return max(counts, key=counts.__getitem__)


def _rounded(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None else tensor.to(dtype).to(tensor.dtype)
