"""Which of the adapters on a model are in use, and which of their tensors learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import TypeVar

from torch import nn

from ..errors import UsageError
from .modules import (
    active_adapters,
    adapted_modules,
    adapter_names,
    adapter_versions,
    adapters_of,
    check_known,
    check_not_fused,
    check_not_routed,
    fourier_layers,
    is_fused,
)
from .saved_modules import versions_of

Model = TypeVar("Model", bound=nn.Module)


def activate(model: Model, names: str | Sequence[str]) -> Model:
    """Makes these adapters the active ones; their changes add up.

    Args:
        model: a model with adapters.
        names: one name or several; an empty list leaves the base alone.

    Returns:
        The model.

    Raises:
        UsageError: an unknown name or a name twice; two adapters that have their own version of
            one module (a head, a bias); the model is fused, or a `route` block is open.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    check_known(model, wanted)
    if len(set(wanted)) != len(wanted):
        raise UsageError("activate", expected="every adapter once", found=", ".join(wanted))
    check_not_fused(model, "activate")
    check_not_routed(model, "activate")
    _check_versions(model, wanted)
    _set_active(model, wanted)
    update_learning(model)
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Makes `model` its bare base within the block: no adapter changes it, also if it is fused.

    Afterwards, also after an exception, the same adapters are active and fused as before. An
    adapter that was detached within the block stays detached; if it was fused, nothing is fused.

    Args:
        model: with adapters or without.

    Yields:
        The same model.

    Raises:
        UsageError: a `route` block is open.
    """
    check_not_routed(model, "disabled")
    active, before = active_adapters(model), adapter_names(model)
    fused = {
        layer: layer.exchange_weight(layer.kept_weight, fuse=False)
        for layer in fourier_layers(model).values()
        if layer.kept_weight is not None
    }
    try:
        _set_active(model, ())
        update_learning(model)
        yield model
    finally:
        left = adapter_names(model)
        _set_active(model, [name for name in active if name in left])
        if set(before) <= set(left):
            for layer, weight in fused.items():
                layer.exchange_weight(weight, fuse=True)
        update_learning(model)


def update_learning(model: nn.Module) -> None:
    """Let those adapter tensors learn that are active and trainable, none while the model is fused.

    Inactive ones must not require gradients: DistributedDataParallel waits for all that do.
    """
    learning = set() if is_fused(model) else set(active_adapters(model))
    for name in adapter_names(model):
        for parameter, trainable in _parameters(model, name):
            parameter.requires_grad_(trainable and name in learning)


def let_learn(model: nn.Module, names: Iterable[str]) -> None:
    """Let what is trainable of these adapters learn, too, until the next `update_learning`."""
    for name in names:
        for parameter, trainable in _parameters(model, name):
            if trainable:
                parameter.requires_grad_()


@dataclass(frozen=True)
class TrainableParameters:
    """How many values in the parameters of a model are trained.

    Attributes:
        count: values in parameters that require gradients.
        total: values in all parameters.
    """

    count: int
    total: int

    @property
    def share(self) -> float:
        """Count / total; 0 for a model without parameters."""
        return self.count / self.total if self.total else 0.0


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Counts the parameters that learn, as PEFT's `get_nb_trainable_parameters` does.

    Args:
        model: with adapters or without.

    Returns:
        The count, the total and the share.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return TrainableParameters(sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes))


def _parameters(model: nn.Module, name: str) -> Iterator[tuple[nn.Parameter, bool]]:
    """(parameter, whether it is trainable) for all of adapter `name`."""
    for adapter in adapters_of(model, name).values():
        yield adapter.spectrum, adapter.trainable
    for version in adapter_versions(model, name).values():
        yield from ((parameter, version.trainable) for parameter in version.own_parameters())


def _set_active(model: nn.Module, names: Sequence[str]) -> None:
    for layer in fourier_layers(model).values():
        layer.active = tuple(name for name in names if name in layer.adapters)
    for module in adapted_modules(model).values():
        versions = versions_of(module)
        module._fourierft_active = next((name for name in names if name in versions), None)


def _check_versions(model: nn.Module, wanted: Sequence[str]) -> None:
    """Values replace each other and cannot add up, so only one active adapter may have its own."""
    clashes = []
    for a, b in permutations(wanted, 2):
        theirs = adapter_versions(model, b)
        for path, version in adapter_versions(model, a).items():
            if path in theirs and wanted.index(a) < wanted.index(b):
                clashes.append(f"{path}: {a} and {b} both have their own")
            inside = [p for p in theirs if p.startswith(f"{path}.")]
            changed = [p for p in adapters_of(model, b) if f"{p}.".startswith(f"{path}.")]
            if version.is_whole:
                clashes += [f"{p}: {a} replaces it, {b} changes it" for p in (*inside, *changed)]
    if clashes:
        raise UsageError(
            "activate",
            expected="at most one active adapter that has its own head or bias for a module",
            found=f"{len(clashes)} clashes",
            remedy="activate one of them at a time",
            offenders=clashes,
        )
