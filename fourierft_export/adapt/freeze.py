"""Stop a base that has adapters from learning and from being saved under the wrappers' names."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import nn

from ..errors import UsageError
from .modules import adapter_names, base_modules, original

FROZEN = "_fourierft_frozen"
_SAVE = "save_pretrained"


def freeze(model: nn.Module) -> None:
    """Stop the base from learning, and its `save_pretrained` from writing the wrappers' names.

    `unfreeze` undoes both.
    """
    holder = original(model)
    frozen: list[str] = list(getattr(holder, FROZEN, ()))
    for path, module in base_modules(model):
        base = original(module)
        for leaf, parameter in base._parameters.items():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append(f"{path}.{leaf}" if path else leaf)
    setattr(holder, FROZEN, tuple(frozen))
    refuse_saving(model)


def refuse_saving(model: nn.Module) -> None:
    """Make `save_pretrained` of the model, and of models within it, raise; `unfreeze` undoes it."""
    for _, module in base_modules(model):
        base = original(module)
        if callable(getattr(type(base), _SAVE, None)) and _SAVE not in base.__dict__:
            base.__dict__[_SAVE] = partial(_refuse_to_save, base)


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
    for _, base in base_modules(model):
        if getattr(base.__dict__.get(_SAVE), "func", None) is _refuse_to_save:
            del base.__dict__[_SAVE]


def _refuse_to_save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces `model.save_pretrained` while there are adapters.

    Checkpoints of transformers' Trainer are written: the Trainer reads them back under the same
    names.

    Raises:
        UsageError: the caller is not the Trainer.
    """
    if sys._getframe(1).f_globals.get("__name__") == "transformers.trainer":
        return getattr(type(model), _SAVE)(model, *args, **kwargs)
    raise UsageError(
        f"{type(model).__name__}.{_SAVE}",
        expected="a model without adapters: from_pretrained would not find these weights again",
        found=f"adapters {', '.join(adapter_names(model)) or 'on a part of the model'}",
        remedy="save the adapter with fourierft_export.capture(model, NAME).save(FILE), or merge "
        "it first with fourierft_export.unload(model, merge=True)",
    )
