"""Modules of which each adapter has its own version: saved heads and trained biases.

A version is a shallow copy of the module with some of its tensors replaced; the rest, and its
children, are shared with the original. A whole head (`modules_to_save`) is done module by module,
so that a head of several layers needs nothing special.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UsageError

if TYPE_CHECKING:
    from .rows import Routing


class Version(nn.Module):
    """One adapter's version of a module.

    Args:
        original: the module to make a version of; it is not changed.
        own: name -> value of the tensors that this version has for itself: parameters and buffers
            of `original`. The values are copied.
        trainable: whether its own parameters learn while the adapter is active.

    Attributes:
        module: the shallow copy.
        own: the names.
    """

    def __init__(self, original: nn.Module, own: Mapping[str, Tensor], trainable: bool) -> None:
        super().__init__()
        module = copy.copy(original)
        module._parameters = dict(original._parameters)
        module._buffers = dict(original._buffers)
        for name, value in own.items():
            value = value.detach().clone()
            if original._parameters.get(name) is not None:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[name] = value
        self.module = module
        self.own = tuple(own)
        self.trainable = trainable

    def own_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, as the version has it now."""
        return {name: getattr(self.module, name) for name in self.own}


class AdaptedModule(nn.Module):
    """A module and the versions that adapters have of it; the active one answers.

    Attributes not found here are those of the active version.

    Args:
        original: the module as it was; kept untouched.

    Attributes:
        versions: adapter name -> `Version`.
        active: the adapter whose version is in use, or None for the original.
        routing: the `route` blocks around the module; None if there never was one.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.versions = nn.ModuleDict()
        self.active: str | None = None
        self.routing: Routing | None = None
        self.train(original.training)

    @property
    def chosen(self) -> nn.Module:
        """The module in use: the active version, or the original."""
        return self.under(self.active)

    def under(self, name: str | None) -> nn.Module:
        """The module that answers under adapter `name`; the original under None."""
        return self.original if name is None else self.version(name).module

    def version(self, name: str) -> Version:
        """Adapter `name`'s version; KeyError if it has none."""
        module = self.versions[name]
        if not isinstance(module, Version):
            raise TypeError(f"{name}: {type(module).__name__}")
        return module

    def add_version(self, name: str, own: Mapping[str, Tensor], trainable: bool) -> None:
        """Add adapter `name`'s version with these tensors of its own; it is not active yet."""
        self.versions[name] = Version(self.original, own, trainable).train(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the chosen module answers; within `route`, each row's own version."""
        if self.routing is not None and (rows := self.routing.current(self)) is not None:
            return rows.module(self, args, kwargs)
        return self.chosen(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "original" not in modules or "versions" not in modules:
                raise
            routing = self.__dict__.get("routing")
            if routing is not None and routing.now is not None:
                return routing.now.attribute(self, name)
            return getattr(self.chosen, name)


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that `module` itself contributes to a state dict, children left out."""
    hidden = module._non_persistent_buffers_set
    tensors: dict[str, torch.Tensor | None] = dict(module._parameters)
    tensors.update({k: v for k, v in module._buffers.items() if k not in hidden})
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def check_can_be_saved(path: str, module: nn.Module) -> None:
    """Refuse modules that no wrapper can stand in for: those that are read rather than called.

    Raises:
        UsageError: `module` has no forward, or is the whole model; its tensors are spread over
            processes.
    """
    found = type(module).__name__
    remedy = "leave it out of modules_to_save and bias"
    if not path:
        what = "a module within the model, not the model itself"
    elif type(module).forward is nn.Module.forward:
        what = "a module that is called"
    elif any(hasattr(tensor, "full_tensor") for tensor in own_state(module).values()):
        # FSDP2 gathers them for this very module; a copy of it would be left with the parts.
        what, found = "whole tensors", "tensors that FSDP2 has spread over processes"
        remedy = "put the adapter on the model first, and spread the model then"
    else:
        return
    raise UsageError(f"module {path or '(the model)'}", expected=what, found=found, remedy=remedy)
