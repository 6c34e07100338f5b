"""Which of the adapters on a model count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TypeVar

from torch import nn

from ..errors import UsageError
from .tree import adapted_modules, check_known, check_not_routed, fourier_layers, is_fused

Model = TypeVar("Model", bound=nn.Module)


def activate(model: Model, names: str | Sequence[str]) -> Model:
    """Make these adapters count, and no others; their changes add up.

    Args:
        model: a model with adapters.
        names: one name or several; an empty list leaves the base alone.

    Returns:
        The model.

    Raises:
        UsageError: an unknown name or a name twice; two adapters that bring their own version of
            one module (a head, a bias); the model is fused, or a `route` block is open.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    check_known(model, wanted)
    if len(set(wanted)) != len(wanted):
        raise UsageError("activate", expected="every adapter once", found=", ".join(wanted))
    if is_fused(model):
        raise UsageError("activate", found="a model that is fused", remedy="call restore first")
    check_not_routed(model, "activate")
    _check_versions(model, wanted)
    for layer in fourier_layers(model).values():
        layer.active = tuple(name for name in wanted if name in layer.adapters)
    for module in adapted_modules(model).values():
        module.active = next((name for name in wanted if name in module.versions), None)
    update_learning(model)
    return model


def update_learning(model: nn.Module) -> None:
    """Let those adapter tensors learn that are active, trainable and not fused.

    Idle ones must not ask for gradients: DistributedDataParallel waits for every one that does.
    """
    fused = is_fused(model)
    for layer in fourier_layers(model).values():
        for name in layer.adapters:
            adapter = layer.adapter(name)
            learns = adapter.trainable and name in layer.active and not fused
            adapter.spectrum.requires_grad_(learns)
    for module in adapted_modules(model).values():
        for name in module.versions:
            version = module.version(name)
            for tensor in version.own_tensors().values():
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    tensor.requires_grad_(version.trainable and name == module.active)


def let_learn(model: nn.Module, names: Sequence[str]) -> None:
    """Let what is trainable of these adapters learn, too, until the next `update_learning`."""
    for layer in fourier_layers(model).values():
        for name in names:
            if name in layer.adapters and layer.adapter(name).trainable:
                layer.adapter(name).spectrum.requires_grad_()
    for module in adapted_modules(model).values():
        for name in names:
            if name in module.versions and module.version(name).trainable:
                for tensor in module.version(name).own_tensors().values():
                    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                        tensor.requires_grad_()


def _check_versions(model: nn.Module, wanted: Sequence[str]) -> None:
    """Values replace each other and cannot add up, so only one active adapter may bring them."""
    layers = fourier_layers(model)
    clashes = []
    for path, module in adapted_modules(model).items():
        bring = [name for name in wanted if name in module.versions]
        clashes += [f"{path}: {a} and {b} both bring their own" for a, b in combinations(bring, 2)]
        if path in layers:
            whole = [name for name in bring if "weight" in module.version(name).own]
            clashes += [
                f"{path}: {a} replaces it, {b} changes it"
                for a in whole
                for b in wanted
                if b in layers[path].adapters
            ]
    if clashes:
        raise UsageError(
            "activate",
            expected="at most one active adapter that brings its own head or bias for a module",
            found=f"{len(clashes)} clashes",
            remedy="activate one of them at a time",
            offenders=clashes,
        )
