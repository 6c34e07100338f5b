"""Bundles onto a live model, off it again, and out of it: attach, detach, capture."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ..bundle import fingerprint
from ..bundle.file import Bundle
from ..bundle.spec import EXPLICIT_RULE, AdapterSpec, Fingerprint, LayerSpec
from ..errors import UsageError
from ..spectral.entries import entries_sha256
from ..types import Array
from .active import activate, update_learning
from .adapter import AdapterOrigin
from .inject import base_model_name, freeze, unfreeze
from .linear import float_weight, is_conv1d, layer_device, to_array, to_tensor
from .placing import plan_attachment
from .tree import (
    active_adapters,
    adapted_modules,
    adapter_names,
    base_modules,
    check_known,
    check_new_name,
    check_not_routed,
    ensure_adapted,
    ensure_fourier,
    fourier_layers,
    is_fused,
    original,
    put,
)

Model = TypeVar("Model", bound=nn.Module)


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
        UsageError: the name is taken; the model has no weights yet (meta device), is fused, or is
            within a `route` block; the bundle both replaces and changes a weight.
        BaseMismatchError: layers or tensors that the model lacks, other shapes, other base
            weights: all of them listed. The model is unchanged after either.
    """
    check_new_name(model, name)
    plan = plan_attachment(model, bundle, allow_base_mismatch)
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
        ensure_fourier(model, path, modules[path]).add_adapter(
            name,
            spectrum,
            origin,
            entries=plan.bundle.entries(layer.name),
            entry_rule=layer.entry_rule,
            trainable=trainable,
        )
    for path, tensors in plan.saved.items():
        ensure_adapted(model, path).add_version(name, tensors, trainable)
    return activate(model, name)


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
        UsageError: no adapter of that name; the model is fused and others would stay; a `route`
            block is open.
    """
    if name is not None:
        check_known(model, [name])
    check_not_routed(model, "detach")
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

    Layers and tensors are named by their paths in the base, as if no adapter were there. Layers
    without a plain float weight (quantised ones) get no fingerprint: the adapter may be merged
    into the unquantised base, whose weights are other numbers.

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
        if adapter.spectrum.is_meta or layer_device(base).type == "meta":
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
                fingerprint=_fingerprint(base),
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


def _fingerprint(base: nn.Module) -> Fingerprint | None:
    """Of a plain float weight; integers and scales are not what an adapter is merged into."""
    weight = float_weight(base)
    return None if weight is None else fingerprint.fingerprint(to_array(weight))
