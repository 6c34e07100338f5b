"""Put a new adapter on a model, ready to train."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .active import activate
from .adapter import AdapterOrigin
from .config import FourierFTConfig
from .linear import describe, float_weight, is_linear, is_plain, layer_device
from .saved import check_can_be_saved, own_state
from .targets import Selection, select
from .tree import (
    adapter_names,
    base_modules,
    check_new_name,
    ensure_adapted,
    ensure_fourier,
    original,
)

Model = TypeVar("Model", bound=nn.Module)

FROZEN = "_fourierft_frozen"


def inject(model: Model, config: FourierFTConfig, name: str = "default") -> Model:
    """Replace the targeted layers by `FourierLinear` and freeze everything but the new adapter.

    The new adapter becomes the only active one. Its spectra are drawn as PEFT draws them: from
    torch's global CPU generator, layer by layer in the model's order.

    Args:
        model: any module; it is changed in place. Layers on the meta device are fine.
        config: what to adapt.
        name: the adapter's name; other adapters may be on the model already.

    Returns:
        The same model.

    Raises:
        UsageError: the name is taken, or the configuration does not fit the model (`select`);
            the model is unchanged then.
    """
    check_new_name(model, name)
    selection = select(model, config)
    versions = _own_tensors(model, config, selection)
    freeze(model)
    origin = AdapterOrigin(
        config.random_loc_seed, config.scaling, config.task_type, base_model_name(model)
    )
    modules = dict(base_modules(model))
    for path, n_frequency in selection.targets.items():
        spectrum = _initial_spectrum(n_frequency, original(modules[path]), config.init_weights)
        layer = ensure_fourier(model, path, modules[path])
        layer.add_adapter(name, spectrum, origin)
    for path, tensors in versions.items():
        ensure_adapted(model, path).add_version(name, tensors, trainable=True)
    return activate(model, name)


def base_model_name(model: nn.Module) -> str | None:
    """Name or path that transformers loaded `model` from, or None."""
    name = getattr(getattr(original(model), "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def freeze(model: nn.Module) -> None:
    """Stop the base from learning; `detach` lets those parameters learn again."""
    holder = original(model)
    frozen: list[str] = list(getattr(holder, FROZEN, ()))
    for path, module in base_modules(model):
        for leaf, parameter in original(module)._parameters.items():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append(f"{path}.{leaf}" if path else leaf)
    setattr(holder, FROZEN, tuple(frozen))


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze`, once no adapter is left."""
    if adapter_names(model):
        return
    holder = original(model)
    frozen = set(getattr(holder, FROZEN, ()))
    for name, parameter in holder.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(True)
    if hasattr(holder, FROZEN):
        delattr(holder, FROZEN)


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
    versions: dict[str, dict[str, Tensor]] = {}
    quantised: list[str] = []
    for path, module in base_modules(model):
        base = original(module)
        saved = any(path == root or path.startswith(f"{root}.") for root in selection.saved)
        wants_bias = config.bias == "all" or (
            config.bias == "fourier_only" and path in selection.targets
        )
        if saved:
            own = own_state(base)
        elif wants_bias and isinstance(base._parameters.get("bias"), nn.Parameter):
            own = {"bias": own_state(base)["bias"]}
        else:
            continue
        if saved and _is_quantised(base):
            quantised.append(f"{path}: {describe(base)}")
        if own:
            check_can_be_saved(path, base)
            versions[path] = own
    if quantised:
        raise UsageError(
            "modules_to_save",
            expected="modules whose parameters can learn",
            found=f"{len(quantised)} quantised layers",
            remedy="leave these modules out of the quantisation",
            offenders=quantised,
        )
    return versions


def _is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer has no parameters, or some that are no plain floats."""
    there = list(module.parameters())  # those within it, too: a head may tell its own sizes
    return is_linear(module) and not (there and all(map(is_plain, there)))
