"""Attach bundles to a live model, replace, combine and detach adapters, and capture them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from ..bundle.bundle import Bundle
from ..bundle.combine import combine_bundles
from ..bundle.fingerprint import fingerprint
from ..bundle.peft import BundleSource, open_bundle
from ..bundle.spec import EXPLICIT_RULE, LayerSpec
from ..errors import BaseMismatchError
from ..spectral.entries import entries_sha256
from ..types import Array
from . import modules
from .active import activate, freeze, unfreeze, update_learning
from .base_linear import float_weight, is_conv1d, to_array
from .match_bundle import check_has_values, match_bundle

Model = TypeVar("Model", bound=nn.Module)
log = logging.getLogger(__name__)


def attach(
    model: Model,
    bundle: BundleSource,
    name: str = "default",
    *,
    trainable: bool = False,
    allow_base_mismatch: bool = False,
) -> Model:
    """Puts a bundle's adapter on a live model and makes it the only active one.

    The base is frozen, as PEFT freezes it; `detach` lets it learn again. Layer names may differ
    from the model's by one leading segment (an adapter trained on `bert.encoder...` fits a bare
    `encoder...`); tensors of the task model around a bare base, such as its head, have no place
    there and are left out with a log message.

    Args:
        model: changed in place.
        bundle: a bundle, or the path of one or of a PEFT adapter directory. An unbound one takes
            its shapes from the model, and only those are checked then.
        name: the adapter's name on this model.
        trainable: continue training it: its spectra become float32 and learn.
        allow_base_mismatch: accept base weights other than those the adapter was trained on.

    Returns:
        The same model.

    Raises:
        FileAccessError, BadInputError: the path is no bundle and no adapter, or its content is
            damaged.
        UsageError: the name is taken; the model has no weights yet (meta device), is fused, or is
            within a `route` block; the bundle both replaces and changes a weight.
        BaseMismatchError: layers or tensors that the model lacks, other shapes, other base
            weights: all of them listed. The model is unchanged after any of these.

    Example:
        >>> import fourierft_export as ff, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> bundle = ff.capture(ff.inject(model, config))
        >>> model = ff.attach(ff.detach(model), bundle, "again")
        >>> ff.adapter_names(model)
        ('again',)
    """
    modules.check_new_name(model, name)
    loaded = open_bundle(bundle)
    match = match_bundle(model, loaded, allow_base_mismatch)
    freeze(model)
    bases = dict(modules.base_modules(model))
    for path, layer, spectrum, entries in match.layers():
        if trainable:
            spectrum = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
        modules.ensure_fourier(model, path, bases[path]).add_adapter(
            name, spectrum, loaded.spec, entries, layer.entry_rule, trainable=trainable
        )
    for path, tensors in match.saved.items():
        modules.add_saved(model, path, name, tensors, trainable)
    return activate(model, name)


@torch.no_grad()
def replace(
    model: Model,
    bundle: BundleSource,
    name: str = "default",
    *,
    allow_base_mismatch: bool = False,
) -> Model:
    """Gives adapter `name` the values of another bundle, in place.

    Its parameters stay the same objects, so a compiled model is not compiled again (unless the
    scaling differs) and an optimizer goes on with them. Seed, entries and scaling may differ.

    Args:
        model: changed in place.
        bundle: for the same layers, with as many coefficients each, and the same saved tensors.
        name: the adapter to replace.
        allow_base_mismatch: accept base weights other than those the bundle was trained on.

    Returns:
        The same model.

    Raises:
        UsageError: an unknown name; the model is fused or within a `route` block.
        BaseMismatchError: other layers, numbers of coefficients or saved tensors than the adapter
            has: all of them listed. The model is unchanged then.
    """
    modules.check_known(model, [name])
    modules.check_not_fused(model, "replace")
    modules.check_not_routed(model, "replace")
    loaded = open_bundle(bundle)
    match = match_bundle(model, loaded, allow_base_mismatch)
    adapters, tensors = modules.adapters_of(model, name), modules.saved_tensors(model, name)
    values = {f"{p}.{leaf}": t for p, held in match.saved.items() for leaf, t in held.items()}
    here = {path: [adapter.n_frequency] for path, adapter in adapters.items()}
    here |= {key: list(tensor.shape) for key, tensor in tensors.items()}
    there = {path: [layer.n_frequency] for path, layer, *_ in match.layers()}
    there |= {key: list(tensor.shape) for key, tensor in values.items()}
    wrong = [
        f"{key}: {here.get(key, 'nothing')} here, {there.get(key, 'nothing')} in the bundle"
        for key in {**here, **there}
        if here.get(key) != there.get(key)
    ]
    if wrong:
        raise BaseMismatchError(
            f"adapter {name!r}",
            expected="a bundle of the same layers, numbers of coefficients and saved tensors",
            found=f"{len(wrong)} differences",
            remedy="detach the adapter and attach the bundle",
            offenders=wrong,
        )
    for path, layer, spectrum, entries in match.layers():
        adapters[path].replace_values(
            spectrum, entries, layer.entry_rule or EXPLICIT_RULE, loaded.spec
        )
    for key, tensor in tensors.items():
        tensor.copy_(values[key])
    return model


def detach(model: Model, name: str | None = None) -> Model:
    """Removes one adapter from a model, or all of them.

    A layer without adapters is the original module again, the same object. After the last adapter
    the base learns as it did before the first. A model without adapters is not changed. Adapters
    that are left stay active or inactive; if none of them is active, a log message says so.

    Args:
        model: changed in place.
        name: the adapter; all by default.

    Returns:
        The same model.

    Raises:
        UsageError: no adapter of that name; the model is fused and other adapters would be left; a
            `route` block is open.
    """
    if name is not None:
        modules.check_known(model, [name])
    modules.check_not_routed(model, "detach")
    there = modules.adapter_names(model)
    gone = there if name is None else (name,)
    if set(gone) != set(there):
        modules.check_not_fused(model, "detach")
    for layer in modules.fourier_layers(model).values():
        if layer.kept_weight is not None:
            layer.exchange_weight(layer.kept_weight, fuse=False)
    was_active = modules.active_adapters(model)
    for one in gone:
        modules.remove_adapter(model, one)
    update_learning(model)
    left = modules.adapter_names(model)
    if not left:
        unfreeze(model)
    elif was_active and not modules.active_adapters(model):
        log.warning("no adapter is active now; %s can be activated", ", ".join(left))
    return model


def capture(model: nn.Module, name: str = "default") -> Bundle:
    """Makes a bundle of one adapter of a live model, bound to the model's base.

    Layers and tensors are named by their paths in the base, without adapters. Layers without a
    plain float weight (quantised ones) get no fingerprint: the adapter may be merged into the
    unquantised base, whose weights are other numbers.

    Args:
        model: with adapters; it stays as it is.
        name: of the adapter.

    Returns:
        The bundle.

    Raises:
        UsageError: no adapter of that name, or it has no values yet (meta device).
        BadInputError: its values are not finite.

    Example:
        >>> import fourierft_export as ff, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> model = ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> bundle = ff.capture(model)
        >>> bundle.is_bound, bundle.spectra["0"].shape
        (True, (5,))
    """
    modules.check_known(model, [name])
    specs: list[LayerSpec] = []
    spectra: dict[str, Array] = {}
    explicit: dict[str, Array] = {}
    layers, adapters = modules.fourier_layers(model), modules.adapters_of(model, name)
    for path, adapter in adapters.items():
        base = modules.original(layers[path])
        for module in (base, adapter):
            check_has_values(path, module)
        spectra[path] = to_array(adapter.spectrum)
        if adapter.entry_rule == EXPLICIT_RULE:
            explicit[path] = adapter.host_entries
        kept = layers[path].kept_weight
        weight = float_weight(base) if kept is None else kept
        specs.append(
            LayerSpec(
                name=path,
                n_frequency=adapter.n_frequency,
                shape=adapter.shape,
                fan_in_fan_out=is_conv1d(base),
                entry_rule=adapter.entry_rule,
                entries_sha256=entries_sha256(adapter.host_entries),
                fingerprint=None if weight is None else fingerprint(to_array(weight)),
            )
        )
    origin = next(iter(adapters.values())).origin
    base_name = origin.base_model or modules.base_model_name(model)
    spec = dataclasses.replace(origin, layers=tuple(specs), base_model=base_name)
    saved = {key: to_array(tensor) for key, tensor in modules.saved_tensors(model, name).items()}
    return Bundle.build(spec, spectra, saved, explicit, where=f"adapter {name!r}")


def combine(
    model: Model,
    weights: Mapping[str, float],
    name: str,
    *,
    heads: str | None = None,
    trainable: bool = False,
) -> Model:
    """Adds an adapter whose delta_W is the weighted sum of other adapters', and activates it.

    The sum is exact (`bundle.combine.combine_bundles` says how it is stored); the adapters
    themselves stay as they are, and the new one can be captured, saved and merged as any other.

    Args:
        model: changed in place.
        weights: adapter name -> finite factor; `{"a": 1, "b": -0.5}`.
        name: the new adapter's name.
        heads: saved heads and biases cannot be added. None takes each from the only adapter that
            has it; an adapter's name takes those of that one and no others; "average" takes
            means, weighted by `weights`, over the adapters that have the tensor.
        trainable: continue training it: its spectra and heads learn, the base is frozen.

    Returns:
        The same model.

    Raises:
        UsageError: an unknown name, a name that is taken, weights that are no finite numbers;
            several adapters bring a head or bias and `heads` does not say what to do; the model
            is fused, or a `route` block is open.
    """
    modules.check_new_name(model, name)
    modules.check_known(model, weights)
    parts = {part: capture(model, part) for part in weights}
    bundle = combine_bundles(parts, list(weights.values()), heads=heads)
    return attach(model, bundle, name, trainable=trainable)
