"""Put a new adapter on a model, ready to train."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..bundle.spec import AdapterSpec
from ..errors import UsageError
from . import modules
from .active import activate, freeze
from .base_linear import describe, float_weight, is_linear, is_plain, layer_device
from .config import ConfigSource, FourierFTConfig, load_config
from .match_bundle import check_not_offloaded
from .saved_modules import check_can_be_saved, is_container, own_state, state_tensors
from .targets import Selection, select

Model = TypeVar("Model", bound=nn.Module)


def inject(model: Model, config: ConfigSource, name: str = "default") -> Model:
    """Replaces the targeted layers by `FourierLinear` and freezes all but the new adapter.

    The new adapter becomes the only active one. Its spectra are drawn as PEFT draws them: from
    torch's global CPU generator, layer by layer in the model's order.

    Args:
        model: any module; it is changed in place. Layers on the meta device are fine.
        config: what to adapt: a `FourierFTConfig`, PEFT's own, a dictionary of their fields, or the
            path of an adapter_config.json or of the directory that holds it.
        name: the adapter's name; other adapters may be on the model already.

    Returns:
        The same model.

    Raises:
        UsageError: the name is taken, or the configuration does not fit the model (`select`);
            the model is unchanged then.

    Example:
        >>> import fourierft_export as ff, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> model = ff.inject(model, config)
        >>> type(model[0]).__name__, ff.trainable_parameters(model).count
        ('FourierLinear', 5)
    """
    modules.check_new_name(model, name)
    config = load_config(config)
    selection = select(model, config)
    versions = _own_tensors(model, config, selection)
    bases = dict(modules.base_modules(model))
    for path in (*selection.targets, *versions):
        check_not_offloaded(path, modules.original(bases[path]))
    freeze(model)
    base_name = modules.base_model_name(model)
    origin = AdapterSpec(config.random_loc_seed, config.scaling, (), config.task_type, base_name)
    for path, n_frequency in selection.targets.items():
        spectrum = _initial_spectrum(
            n_frequency, modules.original(bases[path]), config.init_weights
        )
        modules.ensure_fourier(model, path, bases[path]).add_adapter(name, spectrum, origin)
    for path, tensors in versions.items():
        modules.add_saved(model, path, name, tensors, trainable=True)
    return activate(model, name)


def _initial_spectrum(n_frequency: int, linear: nn.Module, zeros: bool) -> Tensor:
    """Standard normal numbers or zeros, in the base's dtype but at least float32."""
    weight = float_weight(linear)
    dtype = torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32)
    if layer_device(linear).type == "meta":
        return torch.empty(n_frequency, dtype=dtype, device="meta")
    # PEFT draws before it zeroes; drawing too leaves the generator where a user of PEFT finds it.
    spectrum = torch.randn(n_frequency).to(dtype)
    return torch.zeros_like(spectrum) if zeros else spectrum


def _own_tensors(
    model: nn.Module, config: FourierFTConfig, selection: Selection
) -> dict[str, dict[str, Tensor]]:
    """Path -> tensors of which the adapter needs its own: whole saved modules, biases."""
    bases = {path: modules.original(module) for path, module in modules.base_modules(model)}
    versions: dict[str, dict[str, Tensor]] = {}
    inside: set[str] = set()
    for root in selection.saved:
        inside |= {path for path in bases if f"{path}.".startswith(f"{root}.")}
        for path in _callable_roots(root, bases):
            check_can_be_saved(path, bases[path])
            versions[path] = state_tensors(bases[path])
    linear = {p: m for p, m in bases.items() if p in inside and is_linear(m)}
    # A layer has no parameters or some that are no plain floats; a head may have sizes of its own.
    quantised = [
        f"{path}: {describe(module)}"
        for path, module in linear.items()
        if not (there := list(module.parameters())) or not all(map(is_plain, there))
    ]
    if quantised:
        raise UsageError(
            "modules_to_save",
            expected="modules whose parameters can learn",
            found=f"{len(quantised)} quantised layers",
            remedy="leave these modules out of the quantisation",
            offenders=quantised,
        )
    biased = {"all": tuple(bases), "fourier_only": tuple(selection.targets)}.get(config.bias, ())
    for path in biased:
        if path not in inside and isinstance(bases[path]._parameters.get("bias"), Tensor):
            check_can_be_saved(path, bases[path])
            versions[path] = {"bias": own_state(bases[path])["bias"]}
    return versions


def _callable_roots(path: str, bases: dict[str, nn.Module]) -> list[str]:
    """The modules to save for `path`: itself, or those that a mere container holds."""
    module = bases[path]
    if not state_tensors(module):
        return []
    if not is_container(module):
        return [path]
    inner = [f"{path}.{name}" for name in module._modules]
    return [root for one in inner if one in bases for root in _callable_roots(one, bases)]
