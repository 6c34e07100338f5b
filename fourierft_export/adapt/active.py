"""Which adapters of a model are in use, which of its tensors learn, and how it may be saved."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

from torch import nn

from ..errors import UsageError
from . import modules
from .saved_modules import versions_of

Model = TypeVar("Model", bound=nn.Module)
_FROZEN = "_fourierft_frozen"
_SAVE = "save_pretrained"


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
    modules.check_known(model, wanted)
    if len(set(wanted)) != len(wanted):
        raise UsageError("activate", expected="every adapter once", found=", ".join(wanted))
    modules.check_not_fused(model, "activate")
    modules.check_not_routed(model, "activate")
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
    modules.check_not_routed(model, "disabled")
    active, before = modules.active_adapters(model), modules.adapter_names(model)
    fused = {
        layer: layer.exchange_weight(layer.kept_weight, fuse=False)
        for layer in modules.fourier_layers(model).values()
        if layer.kept_weight is not None
    }
    try:
        _set_active(model, ())
        update_learning(model)
        yield model
    finally:
        left = modules.adapter_names(model)
        _set_active(model, [name for name in active if name in left])
        if set(before) <= set(left):
            for layer, weight in fused.items():
                layer.exchange_weight(weight, fuse=True)
        update_learning(model)


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


def update_learning(model: nn.Module) -> None:
    """Let those adapter tensors learn that are active and trainable, none while the model is fused.

    Inactive ones must not require gradients: DistributedDataParallel waits for all that do.
    """
    learning = set() if modules.is_fused(model) else set(modules.active_adapters(model))
    for name in modules.adapter_names(model):
        for parameter, trainable in _parameters(model, name):
            parameter.requires_grad_(trainable and name in learning)


def let_learn(model: nn.Module, names: Iterable[str]) -> None:
    """Let what is trainable of these adapters learn, too, until the next `update_learning`."""
    for name in names:
        for parameter, trainable in _parameters(model, name):
            parameter.requires_grad_(trainable or parameter.requires_grad)


def _parameters(model: nn.Module, name: str) -> Iterator[tuple[nn.Parameter, bool]]:
    """(parameter, whether it is trainable) for all of adapter `name`."""
    for adapter in modules.adapters_of(model, name).values():
        yield adapter.spectrum, adapter.trainable
    for version in modules.adapter_versions(model, name).values():
        yield from ((parameter, version.trainable) for parameter in version.own_parameters())


def _set_active(model: nn.Module, names: Sequence[str]) -> None:
    for layer in modules.fourier_layers(model).values():
        layer.active = tuple(name for name in names if name in layer.adapters)
    for module in modules.adapted_modules(model).values():
        versions = versions_of(module)
        module._fourierft_active = next((name for name in names if name in versions), None)


def _check_versions(model: nn.Module, wanted: Sequence[str]) -> None:
    """Values replace each other and cannot add up, so only one active adapter may have its own."""
    versions = {name: modules.adapter_versions(model, name) for name in wanted}
    clashes = []
    for a, b in combinations(wanted, 2):
        both = [path for path in versions[a] if path in versions[b]]
        clashes += [f"{path}: {a} and {b} both have their own" for path in both]
        for one, other in ((a, b), (b, a)):
            whole = [f"{path}." for path, version in versions[one].items() if version.is_whole]
            changed = (
                p for p in modules.adapters_of(model, other) if f"{p}.".startswith(tuple(whole))
            )
            inside = (p for p in versions[other] if p.startswith(tuple(whole)))
            clashes += [f"{p}: {one} replaces it, {other} changes it" for p in (*inside, *changed)]
    if clashes:
        raise UsageError(
            "activate",
            expected="at most one active adapter that has its own head or bias for a module",
            found=f"{len(clashes)} clashes",
            remedy="activate one of them at a time",
            offenders=clashes,
        )


def freeze(model: nn.Module) -> None:
    """Stop the base from learning, and its `save_pretrained` from writing the wrappers' names.

    `unfreeze` undoes both.
    """
    holder = modules.original(model)
    frozen: list[str] = list(getattr(holder, _FROZEN, ()))
    for path, module in modules.base_modules(model):
        for leaf, parameter in modules.original(module)._parameters.items():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append(f"{path}.{leaf}" if path else leaf)
    setattr(holder, _FROZEN, tuple(frozen))
    refuse_saving(model)


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze` of the model and of models within it, once no adapter is left."""
    for _, base in modules.base_modules(model):
        frozen = set(base.__dict__.pop(_FROZEN, ()))
        for name, parameter in base.named_parameters(remove_duplicate=False) if frozen else ():
            parameter.requires_grad_(parameter.requires_grad or name in frozen)
        if getattr(base.__dict__.get(_SAVE), "func", None) is _refuse_to_save:
            del base.__dict__[_SAVE]


def refuse_saving(model: nn.Module) -> None:
    """Make `save_pretrained` of the model, and of models within it, raise; `unfreeze` undoes it."""
    for _, module in modules.base_modules(model):
        base = modules.original(module)
        if callable(getattr(type(base), _SAVE, None)) and _SAVE not in base.__dict__:
            base.__dict__[_SAVE] = partial(_refuse_to_save, base)


def _refuse_to_save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a model with adapters: for transformers' Trainer only, which reads back
    what it writes under the same names.
    """
    if sys._getframe(1).f_globals.get("__name__") == "transformers.trainer":
        return getattr(type(model), _SAVE)(model, *args, **kwargs)
    raise UsageError(
        f"{type(model).__name__}.{_SAVE}",
        expected="a model without adapters: from_pretrained would not find these weights again",
        found=f"adapters {', '.join(modules.adapter_names(model)) or 'on a part of the model'}",
        remedy="save the adapter with fourierft_export.capture(model, NAME).save(FILE), or merge "
        "it first with fourierft_export.unload(model, merge=True)",
    )
