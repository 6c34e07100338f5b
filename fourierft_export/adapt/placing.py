"""Where a bundle's layers and tensors go on a live model, and whether they belong there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..bundle import fingerprint
from ..bundle.file import Bundle
from ..bundle.spec import LayerSpec
from ..errors import BaseMismatchError, UsageError
from ..models.base import find_bridge
from .linear import float_weight, is_linear, layer_device, layer_shape, to_array, to_tensor
from .saved import check_can_be_saved, own_state
from .tree import base_modules, did_you_mean, original

log = logging.getLogger(__name__)


@dataclass
class Plan:
    """What goes where: path in the model -> layer; path -> tensors of its own."""

    layers: dict[str, LayerSpec] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def plan_attachment(model: nn.Module, bundle: Bundle, allow_base_mismatch: bool) -> Plan:
    """Find a place on `model` for everything that `bundle` brings; nothing is changed.

    Raises:
        UsageError, BaseMismatchError: as in `attach`.
    """
    modules = {path: original(module) for path, module in base_modules(model)}
    roots = {path.split(".")[0] for path in modules}
    bridge = find_bridge([layer.name for layer in bundle.layers], roots, modules.__contains__)
    plan = Plan()
    wrong: list[str] = []
    other_weights: list[str] = []
    unchecked: list[str] = []
    for layer in bundle.layers:
        path = bridge.to_base(layer.name)
        problem = _misfit(layer, modules.get(path), path, modules)
        if problem:
            wrong.append(f"{layer.name}: {problem}")
            continue
        plan.layers[path] = layer
        weight = float_weight(modules[path])
        if layer.fingerprint is not None and weight is None:
            unchecked.append(path)
        elif layer.fingerprint is not None and weight is not None:
            verdict = fingerprint.compare(layer.fingerprint, to_array(weight))
            if verdict == "different":
                other_weights.append(f"{layer.name}: another weight than it was trained on")
            elif verdict == "precision":
                log.info("%s: trained on %s weights", layer.name, layer.fingerprint.dtype)
    for tensor_name, array in bundle.saved.items():
        if bridge.strip and not tensor_name.startswith(f"{bridge.strip}."):
            log.warning("%s: this bare model has no place for it; left out", tensor_name)
            continue
        path, _, leaf = bridge.to_base(tensor_name).rpartition(".")
        there = own_state(modules[path]).get(leaf) if path in modules else None
        if there is None:
            wrong.append(f"{tensor_name}: no such tensor in the model")
        elif tuple(there.shape) != array.shape:
            wrong.append(
                f"{tensor_name}: shape {list(array.shape)} expected, found {list(there.shape)}"
            )
        else:
            value = to_tensor(array)
            if value.is_floating_point() and not there.is_floating_point():
                wrong.append(f"{tensor_name}: floats expected, found {there.dtype} (quantised)")
                continue
            check_can_be_saved(path, modules[path])
            _check_not_meta(path, there.device)
            plan.saved.setdefault(path, {})[leaf] = value.to(there.device, there.dtype)
    if unchecked:
        log.info(
            "%d quantised layers (%s, ...): no check was possible that the adapter belongs to them",
            len(unchecked),
            unchecked[0],
        )
    if not allow_base_mismatch:
        wrong += other_weights
    if wrong:
        raise BaseMismatchError(
            f"attach to {type(model).__name__}",
            expected="the base that the adapter was trained on",
            found=f"{len(wrong)} layers or tensors that do not fit",
            remedy="give the model that the adapter belongs to"
            if wrong != other_weights
            else "give the model that the adapter belongs to, or allow_base_mismatch=True",
            offenders=wrong,
        )
    both = [f"{path}.weight" for path in plan.layers if "weight" in plan.saved.get(path, ())]
    if both:
        raise UsageError(
            f"attach to {type(model).__name__}",
            expected="an adapter that either replaces a weight or changes it",
            found=f"{len(both)} weights that it does both to",
            remedy="leave these layers out of target_modules or of modules_to_save",
            offenders=both,
        )
    return plan


def _check_not_meta(path: str, device: torch.device) -> None:
    if device.type == "meta":
        raise UsageError(
            f"layer {path}",
            expected="a model with weights",
            found="the meta device",
            remedy="load the weights first, then attach",
        )


def _misfit(
    layer: LayerSpec, module: nn.Module | None, path: str, modules: Mapping[str, nn.Module]
) -> str | None:
    """Why a layer cannot sit on `module`, or None."""
    if module is None:
        linear = [p for p, m in modules.items() if is_linear(m)]
        return f"no such layer in the model; {did_you_mean(path, linear) or 'none is alike'}"
    if not is_linear(module):
        return f"a linear layer expected, found {type(module).__name__}"
    _check_not_meta(path, layer_device(module))
    shape = layer_shape(module)
    if layer.shape is not None and layer.shape != shape:
        return f"shape {list(layer.shape)} expected, found {list(shape)}"
    if layer.n_frequency > shape[0] * shape[1]:
        return f"n_frequency {layer.n_frequency} above the size of {list(shape)}"
    return None
