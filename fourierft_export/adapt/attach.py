"""Bundles onto a live model, off it again, and out of it: attach, detach, capture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..bundle import fingerprint
from ..bundle.file import Bundle
from ..bundle.spec import EXPLICIT_RULE, AdapterSpec, LayerSpec
from ..errors import BaseMismatchError, UsageError
from ..models.base import find_bridge
from ..spectral.entries import current_rule, entries_sha256
from .active import activate, update_learning
from .adapter import AdapterOrigin
from .inject import base_model_name, freeze, unfreeze
from .linear import is_conv1d, is_linear, layer_shape, stored_weight, to_array, to_tensor
from .saved import check_can_be_saved, own_state
from .tree import (
    active_adapters,
    adapted_modules,
    adapter_names,
    base_modules,
    check_known,
    check_new_name,
    did_you_mean,
    ensure_adapted,
    ensure_fourier,
    fourier_layers,
    is_fused,
    original,
    put,
)

Model = TypeVar("Model", bound=nn.Module)
Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger(__name__)


def attach(
    model: Model,
    bundle: Bundle,
    name: str = "default",
    *,
    trainable: bool = False,
    allow_base_mismatch: bool = False,
) -> Model:
    """Put a bundle's adapter on a live model and make it the only active one.

    Layer names may differ from the model's by one leading segment (an adapter trained on
    `bert.encoder...` fits a bare `encoder...`); tensors of the task model around a bare base, such
    as its head, have no place there and are left out with a log message.

    Args:
        model: changed in place.
        bundle: bound or not; an unbound one takes its shapes from the model, and only those are
            checked then.
        name: the adapter's name on this model.
        trainable: continue training it: its spectra become float32 and learn, the base is frozen.
        allow_base_mismatch: accept base weights other than those the adapter was trained on.

    Returns:
        The same model.

    Raises:
        UsageError: the name is taken, or the model has no weights yet (meta device).
        BaseMismatchError: layers or tensors that the model lacks, other shapes, other base
            weights: all of them listed, and the model unchanged.
    """
    check_new_name(model, name)
    plan = _plan(model, bundle, allow_base_mismatch)
    if trainable:
        freeze(model)
    spec = bundle.spec
    origin = AdapterOrigin(
        spec.seed, spec.scaling, spec.task_type, spec.base_model, dict(spec.peft_config)
    )
    modules = dict(base_modules(model))
    for path, layer in plan.layers.items():
        spectrum = to_tensor(bundle.spectra[layer.name])
        if trainable:
            spectrum = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
        shape = layer_shape(original(modules[path]))
        rule = layer.entry_rule or current_rule(shape)
        entries = bundle.entries(layer.name) if layer.is_bound else None
        ensure_fourier(model, path, modules[path]).add_adapter(
            name, spectrum, origin, entries=entries, entry_rule=rule, trainable=trainable
        )
    for path, tensors in plan.saved.items():
        ensure_adapted(model, path).add_version(name, tensors, trainable)
    return activate(model, name)


@dataclass
class _Plan:
    """What goes where: path in the model -> layer; path -> tensors of its own."""

    layers: dict[str, LayerSpec] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def _plan(model: nn.Module, bundle: Bundle, allow_base_mismatch: bool) -> _Plan:
    """Find a place for everything before anything is changed."""
    modules = {path: original(module) for path, module in base_modules(model)}
    roots = {path.split(".")[0] for path in modules}
    bridge = find_bridge([layer.name for layer in bundle.layers], roots, modules.__contains__)
    plan = _Plan()
    wrong: list[str] = []
    other_weights: list[str] = []
    for layer in bundle.layers:
        path = bridge.to_base(layer.name)
        problem = _misfit(layer, modules.get(path), path, modules)
        if problem:
            wrong.append(f"{layer.name}: {problem}")
            continue
        plan.layers[path] = layer
        if layer.fingerprint is not None:
            weight = to_array(stored_weight(modules[path]))
            verdict = fingerprint.compare(layer.fingerprint, weight)
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
            check_can_be_saved(path, modules[path])
            value = to_tensor(array).to(there.device, there.dtype)
            plan.saved.setdefault(path, {})[leaf] = value
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
    return plan


def _misfit(
    layer: LayerSpec, module: nn.Module | None, path: str, modules: Mapping[str, nn.Module]
) -> str | None:
    """Why a layer cannot sit on `module`, or None."""
    if module is None:
        linear = [p for p, m in modules.items() if is_linear(m)]
        return f"no such layer in the model; {did_you_mean(path, linear) or 'none is alike'}"
    if not is_linear(module):
        return f"a linear layer expected, found {type(module).__name__}"
    if stored_weight(module).is_meta:
        raise UsageError(
            f"layer {path}",
            expected="a model with weights",
            found="the meta device",
            remedy="load the weights first, then attach",
        )
    shape = layer_shape(module)
    if layer.shape is not None and layer.shape != shape:
        return f"shape {list(layer.shape)} expected, found {list(shape)}"
    if layer.n_frequency > shape[0] * shape[1]:
        return f"n_frequency {layer.n_frequency} above the size of {list(shape)}"
    return None


def detach(model: Model, name: str | None = None) -> Model:
    """Take one adapter off a model, or all of them.

    Where no adapter is left, the original module stands again, the same object. With the last
    adapter gone, parameters that `inject` froze learn again. A model without adapters stays as
    it is.

    Args:
        model: changed in place.
        name: the adapter; all by default.

    Returns:
        The same model.

    Raises:
        UsageError: no adapter of that name; or the model is fused and others would stay.
    """
    if name is not None:
        check_known(model, [name])
    gone = adapter_names(model) if name is None else (name,)
    left = [n for n in active_adapters(model) if n not in gone]
    if is_fused(model) and set(gone) != set(adapter_names(model)):
        raise UsageError("detach", found="a model that is fused", remedy="call restore first")
    for layer in fourier_layers(model).values():
        layer.active = tuple(n for n in layer.active if n in left)
        for one in gone:
            if one in layer.adapters:
                del layer.adapters[one]
    for path, adapted in adapted_modules(model).items():
        adapted.active = adapted.active if adapted.active in left else None
        for one in gone:
            if one in adapted.versions:
                del adapted.versions[one]
        if not adapted.versions:
            holder = fourier_layers(model).get(path)
            if holder is not None:
                holder.base_layer = adapted.original
            else:
                put(model, path, adapted.original)
    for path, layer in fourier_layers(model).items():
        if not layer.adapters:
            put(model, path, layer.base_layer)
    update_learning(model)
    unfreeze(model)
    return model


def capture(model: nn.Module, name: str = "default") -> Bundle:
    """The adapter `name` of a live model as a bundle, bound to the base under it.

    Layers and tensors are named by their paths in the base, as if no adapter were there.

    Raises:
        UsageError: no adapter of that name, or it has no values yet (meta device).
        BadInputError: its values are not finite.
    """
    check_known(model, [name])
    origin: AdapterOrigin | None = None
    specs: list[LayerSpec] = []
    spectra: dict[str, Array] = {}
    explicit: dict[str, Array] = {}
    for path, layer in fourier_layers(model).items():
        if name not in layer.adapters:
            continue
        adapter = layer.adapter(name)
        base = original(layer)
        if adapter.spectrum.is_meta or stored_weight(base).is_meta:
            raise UsageError(
                f"layer {path}",
                expected="values",
                found="the meta device",
                remedy="load the weights first",
            )
        origin = adapter.origin
        spectra[path] = to_array(adapter.spectrum)
        if adapter.entry_rule == EXPLICIT_RULE:
            explicit[path] = adapter.host_entries
        specs.append(
            LayerSpec(
                name=path,
                n_frequency=adapter.n_frequency,
                shape=layer.shape,
                fan_in_fan_out=is_conv1d(base),
                entry_rule=adapter.entry_rule,
                entries_sha256=entries_sha256(adapter.host_entries),
                fingerprint=fingerprint.fingerprint(to_array(stored_weight(base))),
            )
        )
    if origin is None:
        raise UsageError(f"adapter {name!r}", found="no layer that it changes")
    saved = {
        f"{path}.{leaf}": to_array(tensor)
        for path, module in adapted_modules(model).items()
        if name in module.versions
        for leaf, tensor in module.version(name).own_tensors().items()
    }
    spec = AdapterSpec(
        seed=origin.seed,
        scaling=origin.scaling,
        layers=tuple(specs),
        task_type=origin.task_type,
        base_model=origin.base_model or base_model_name(model),
        peft_config=origin.peft_config,
    )
    return Bundle.build(spec, spectra, saved, explicit, where=f"adapter {name!r}")
