"""Modules of which each adapter has its own version: saved heads and trained biases.

A module that an adapter saves whole is copied with all that is in it, as PEFT does; Python's
deepcopy also rebinds what the module keeps of its own methods and parameters. Of a module whose
bias alone is trained, the version shares everything else with the original.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .routing.apply import attribute_by_rows, call_by_rows
from .routing.current_rows import OpenBlocks, current_rows, rows_here


class Version(nn.Module):
    """One adapter's version of a module.

    Args:
        original: the base's module; it is not changed.
        own: name -> value of the tensors that this version has for itself, named as in the state
            dict of `original`. The values are copied.
        trainable: whether its own parameters learn while the adapter is active.

    Attributes:
        own: the names.
        is_whole: whether the version shares no tensor with the original.
        module: the module to call.
    """

    def __init__(self, original: nn.Module, own: Mapping[str, Tensor], trainable: bool) -> None:
        super().__init__()
        self.own = tuple(own)
        self.trainable = trainable
        self.is_whole = set(own) == set(state_tensors(original))
        if self.is_whole:
            self._modules["module"] = _copy_base(original)
        else:
            copied, held = _copy_sharing(original, own), nn.Module()
            for leaf in own:
                held._parameters[leaf] = copied._parameters[leaf]
            self._modules["module"] = held
            # What it shares is out of sight of state dicts, `to`, sharding and optimizers.
            self.__dict__["_shared"] = (copied, original)
        for name, tensor in self.own_tensors().items():
            value = own[name].detach()
            tensor.requires_grad_(False)
            if (tensor.shape, tensor.dtype) == (value.shape, value.dtype):
                tensor.data.copy_(value)  # a second copy of a large head would not fit
            else:
                tensor.data = value.clone()

    def __getattr__(self, name: str) -> Any:
        if name != "module":
            return super().__getattr__(name)
        held = self.__dict__["_modules"]["module"]
        if "_shared" not in self.__dict__:
            return held
        module, original = self.__dict__["_shared"]
        if not torch.compiler.is_compiling():
            # The tensors may have been replaced meanwhile: loaded, moved, or gathered by FSDP2.
            module._parameters.update({**original._parameters, **held._parameters})
            module._buffers.update(original._buffers)
            module.training = self.training
        return module

    def own_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, as the version has it now."""
        found = {}
        for name in self.own:
            path, _, leaf = name.rpartition(".")
            found[name] = getattr(self._modules["module"].get_submodule(path), leaf)  # type: ignore[union-attr]
        return found

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """The tensors of `own_tensors` that can learn."""
        for tensor in self.own_tensors().values():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                yield tensor


class AdaptedModule(nn.Module):
    """A module and the versions that adapters have of it; the active one is used.

    Its attributes and methods are those of the version in use. Only names that the module itself
    does not have (`original`, `versions`, `version`, `active`) are those of the wrapper.
    """

    fourierft_wraps = "original"

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.add_module("original", original)
        self.add_module("versions", nn.ModuleDict())
        self._fourierft_active: str | None = None
        self._fourierft_blocks = OpenBlocks()
        self.train(original.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the version in use returns; within `route`, each row's own version."""
        blocks = self._fourierft_blocks
        if blocks.may_apply and (rows := current_rows(self, blocks)) is not None:
            return call_by_rows(lambda name: module_under(self, name), rows, args, kwargs)
        return module_in_use(self)(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedModule:
        """Move or cast as any module; versions go on sharing the original's tensors."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        link_versions(self)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the module and of all its versions; what torch keeps stays here."""
        if name.startswith("_") or hasattr(AdaptedModule, name) or name == "training":
            super().__setattr__(name, value)
        elif isinstance(value, nn.Module | nn.Parameter):
            raise UsageError(
                f"attribute {name!r} of a module that adapters save",
                found=f"a new {type(value).__name__}",
                remedy="change the values in place, or exchange it before the adapter is put on",
            )
        else:
            for module in (
                unwrap(self),
                *(v.module for v in versions_of(self).values()),
            ):
                setattr(module, name, value)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if "original" not in modules or "versions" not in modules:
            return super().__getattr__(name)
        try:
            if self._fourierft_blocks.count and (rows := rows_here(self)) is not None:
                return attribute_by_rows(lambda n: module_under(self, n), name, rows)
            return getattr(module_in_use(self), name)
        except AttributeError:
            if name in _WRAPPER_ATTRIBUTES:
                return _WRAPPER_ATTRIBUTES[name](self)
            raise


def versions_of(adapted: AdaptedModule) -> MutableMapping[str, Version]:
    """Adapter name -> its version; changes of the mapping are changes of the wrapper."""
    return cast(MutableMapping[str, Version], adapted._modules["versions"])


def module_under(adapted: AdaptedModule, name: str | None) -> nn.Module:
    """The module that is used under adapter `name`; the original under None."""
    module = unwrap(adapted) if name is None else versions_of(adapted)[name].module
    return cast(nn.Module, module)


def module_in_use(module: nn.Module) -> nn.Module:
    """The active adapter's version of a wrapped module, or the original; other modules as such."""
    if not isinstance(module, AdaptedModule):
        return module
    return module_under(module, module._fourierft_active)


def link_versions(adapted: AdaptedModule) -> None:
    """Let the versions share tensors of the original that were replaced; calls do so themselves."""
    for version in versions_of(adapted).values():
        _ = version.module


_WRAPPER_ATTRIBUTES: dict[str, Callable[[AdaptedModule], Any]] = {
    "original": lambda adapted: adapted._modules["original"],
    "versions": versions_of,
    "version": lambda adapted: versions_of(adapted).__getitem__,
    "active": lambda adapted: adapted._fourierft_active,
}


def state_tensors(module: nn.Module, path: str = "") -> dict[str, Tensor]:
    """The tensors of the base's module in its state dict, by name; wrappers within are skipped."""
    base = unwrap(module)
    found = {f"{path}{leaf}": tensor for leaf, tensor in own_state(base).items()}
    for name, child in base._modules.items():
        if child is not None:
            found |= state_tensors(child, f"{path}{name}.")
    return found


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that `module` itself contributes to a state dict, children left out."""
    hidden = module._non_persistent_buffers_set
    tensors: dict[str, torch.Tensor | None] = dict(module._parameters)
    tensors.update({k: v for k, v in module._buffers.items() if k not in hidden})
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def unwrap(module: nn.Module) -> nn.Module:
    """The base's module under the wrappers of adapters (a FourierLinear, an AdaptedModule)."""
    while (child := getattr(type(module), "fourierft_wraps", None)) is not None:
        module = module._modules[child]  # type: ignore[assignment]
    return module


def _copy_base(module: nn.Module) -> nn.Module:
    """A deep copy of the base's module, without the wrappers of adapters in it."""
    memo: dict[int, Any] = {}
    wrapped = [m for m in module.modules() if unwrap(m) is not m]
    for wrapper in reversed(wrapped):  # what lies deeper comes first
        memo[id(wrapper)] = copy.deepcopy(unwrap(wrapper), memo)
    return copy.deepcopy(module, memo)


def _copy_sharing(module: nn.Module, own: Iterable[str]) -> nn.Module:
    """A copy that shares children, hooks and tensors with `module`, the parameters `own` excepted.

    Bound methods that the module keeps of itself become those of the copy.
    """
    shared: list[Any] = [module._modules, *module._modules.values(), *module._buffers.values()]
    shared += [hooks for name, hooks in module.__dict__.items() if "_hooks" in name]
    shared += [tensor for name, tensor in module._parameters.items() if name not in own]
    # deepcopy takes what its memo already holds.
    return copy.deepcopy(module, {id(value): value for value in shared if value is not None})


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others, which may be called without it."""
    held = type(module).forward in (nn.Module.forward, nn.Sequential.forward)
    return held and not own_state(module)


def check_can_be_saved(path: str, module: nn.Module) -> None:
    """Refuse modules that a wrapper cannot replace: those that are read rather than called."""
    found = type(module).__name__
    remedy = "leave it out of modules_to_save and bias"
    if not path:
        what = "a module within the model, not the model itself"
    elif type(module).forward is nn.Module.forward:
        what = "a module that is called"
    elif any(hasattr(tensor, "full_tensor") for tensor in state_tensors(module).values()):
        # FSDP2 gathers them for this very module; a copy of it would be left with the parts.
        what, found = "whole tensors", "tensors that FSDP2 has spread over processes"
        remedy = "put the adapter on the model first, and spread the model then"
    else:
        return
    raise UsageError(f"module {path or '(the model)'}", expected=what, found=found, remedy=remedy)
