"""Where a bundle's layers and tensors go on a live model, and whether they belong there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..bundle.file import Bundle
from ..bundle.fingerprint import compare
from ..bundle.fit import FoundLayer, FoundTensor, check_fits, fit_adapter
from ..bundle.spec import LayerSpec
from ..errors import UsageError
from ..models.names import find_bridge
from .linear import float_weight, is_linear, layer_device, layer_shape, to_array, to_tensor
from .saved import check_can_be_saved, own_state
from .tree import base_modules, did_you_mean, original

log = logging.getLogger(__name__)


@dataclass
class Plan:
    """What goes where.

    Attributes:
        bundle: bound to the model; names stay the adapter's.
        layers: path in the model -> layer.
        saved: path in the model -> tensors of its own by name.
    """

    bundle: Bundle
    layers: dict[str, LayerSpec]
    saved: dict[str, dict[str, Tensor]]


def plan_attachment(model: nn.Module, bundle: Bundle, allow_base_mismatch: bool) -> Plan:
    """Find a place on `model` for everything that `bundle` brings; nothing is changed.

    Raises:
        UsageError, BaseMismatchError: as in `attach`.
    """
    modules = {path: original(module) for path, module in base_modules(model)}
    roots = {path.split(".")[0] for path in modules}
    bridge = find_bridge(bundle.spectra, roots, modules.__contains__)
    paths = {name: bridge.to_base(name) for name in bundle.spectra}
    layers = {name: _found_layer(path, modules) for name, path in paths.items()}
    tensors: dict[str, FoundTensor | str] = {}
    places: dict[str, tuple[str, str, Tensor]] = {}
    for name in bundle.saved:
        if bridge.strip and not name.startswith(f"{bridge.strip}."):
            log.warning("%s: this bare model has no place for it; left out", name)
            continue
        path, _, leaf = bridge.to_base(name).rpartition(".")
        there = own_state(modules[path]).get(leaf) if path in modules else None
        if there is None:
            tensors[name] = "no such tensor in the model"
        else:
            tensors[name] = FoundTensor(tuple(there.shape), not there.is_floating_point())
            places[name] = path, leaf, there
    where = f"attach to {type(model).__name__}"
    fit = fit_adapter(bundle.spec, layers, bundle.saved, tensors)
    check_fits(where, [fit], allow_base_mismatch=allow_base_mismatch)
    for note in fit.notes:
        log.info(note)
    saved: dict[str, dict[str, Tensor]] = {}
    for name, (path, leaf, there) in places.items():
        check_can_be_saved(path, modules[path])
        _check_not_meta(path, there.device)
        value = to_tensor(bundle.saved[name])
        saved.setdefault(path, {})[leaf] = value.to(there.device, there.dtype)
    both = [f"{path}.weight" for path in paths.values() if "weight" in saved.get(path, ())]
    if both:
        raise UsageError(
            where,
            expected="an adapter that either replaces a weight or changes it",
            found=f"{len(both)} weights that it does both to",
            remedy="leave these layers out of target_modules or of modules_to_save",
            offenders=both,
        )
    bound = {paths[layer.name]: layer for layer in fit.spec.layers}
    return Plan(replace(bundle, spec=fit.spec), bound, saved)


def _check_not_meta(path: str, device: torch.device) -> None:
    if device.type == "meta":
        raise UsageError(
            f"layer {path}",
            expected="a model with weights",
            found="the meta device",
            remedy="load the weights first, then attach",
        )


def _found_layer(path: str, modules: Mapping[str, nn.Module]) -> FoundLayer | str:
    """What the model has at `path`, or why an adapter cannot sit there."""
    module = modules.get(path)
    if module is None:
        linear = [p for p, m in modules.items() if is_linear(m)]
        return f"no such layer in the model; {did_you_mean(path, linear) or 'none is alike'}"
    if not is_linear(module):
        return f"a linear layer expected, found {type(module).__name__}"
    _check_not_meta(path, layer_device(module))
    weight = float_weight(module)
    if weight is None:
        return FoundLayer(layer_shape(module))
    return FoundLayer(
        layer_shape(module), compare=lambda expected: compare(expected, to_array(weight))
    )
