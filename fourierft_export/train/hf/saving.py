"""Checkpoints of kilobytes: a model's adapter, and not the base under it.

`divert` makes `save_pretrained` of one model object write its adapter, as PEFT's models do. It is
what transformers' Trainer calls for every checkpoint; what the class would write instead, a copy of
the base with wrappers in its names, no `from_pretrained` could read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import MethodType
from typing import Any

from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ...adapt.attach import capture
from ...adapt.freeze import refuse_saving
from ...adapt.modules import adapter_names
from ...bundle.file import SUFFIX, Bundle
from ...errors import UsageError
from ...files.staging import staged_file
from ..live import adapter_tensors

ADAPTER_FILE = f"adapter{SUFFIX}"
WEIGHTS_FILE = "model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_DIVERTED = "_fourierft_diverted"


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether the Trainer may resume from a folder of this name."""
    return _CHECKPOINT.fullmatch(Path(folder).name) is not None


def write_adapter(
    model: nn.Module, name: str, folder: str | os.PathLike[str], file: str = ADAPTER_FILE
) -> Bundle:
    """Write adapter `name` as `file`, and to a checkpoint of the Trainer one file more.

    That is `WEIGHTS_FILE`, which the Trainer itself loads to resume and to take the best: the
    tensors of all adapters, by their names in the model's state dict.

    Returns:
        The bundle written.

    Raises:
        UsageError: no adapter of that name.
        BadInputError: its values are not finite.
        FileAccessError: the files cannot be written.
    """
    bundle = capture(model, name)
    os.makedirs(folder, exist_ok=True)
    bundle.save(Path(folder) / file, force=True)
    if is_checkpoint(folder):
        tensors = {k: t.detach().cpu().clone() for k, t in adapter_tensors(model).items()}
        with staged_file(Path(folder) / WEIGHTS_FILE, force=True) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    return bundle


def divert(model: nn.Module, name: str) -> None:
    """Let `model.save_pretrained` write adapter `name` only, until `release` or `detach`.

    Nothing happens to a model that has no `save_pretrained`. Its state dict is as it was; loading
    one that holds all adapters and none of the base counts as complete.
    """
    release(model)
    if hasattr(model, "save_pretrained"):
        # A bound method, so that a deep copy of the model saves itself and not this one.
        vars(model)["save_pretrained"] = MethodType(save_pretrained, model)
    handle = model.register_load_state_dict_post_hook(_accept_adapters_alone)
    setattr(model, _DIVERTED, (name, handle))


def release(model: nn.Module) -> None:
    """Undo `divert`."""
    diverted = model.__dict__.pop(_DIVERTED, None)
    if diverted is not None:
        diverted[1].remove()
        model.__dict__.pop("save_pretrained", None)
        if adapter_names(model):
            refuse_saving(model)


def save_pretrained(
    self: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    **settings: Any,
) -> None:
    """Write the adapter of a diverted model; a model without it is saved as its class does.

    Args:
        self: the model.
        save_directory: made if it is not there.
        is_main_process: other processes write nothing.
        settings: those of transformers' method, for which kilobytes have no use.

    Raises:
        UsageError: `push_to_hub` is asked for.
    """
    diverted = self.__dict__.get(_DIVERTED)
    if diverted is None or diverted[0] not in adapter_names(self):
        whole: Any = type(self)
        whole.save_pretrained(self, save_directory, is_main_process=is_main_process, **settings)
        return
    if settings.get("push_to_hub"):
        raise UsageError(
            "save_pretrained",
            found="push_to_hub=True",
            remedy="call the model's own push_to_hub, or upload the folder",
        )
    if is_main_process:
        write_adapter(self, diverted[0], save_directory)


def _accept_adapters_alone(model: nn.Module, found: _IncompatibleKeys) -> None:
    """Keep the Trainer from warning, for every tensor of the base, that it is not in the file."""
    if found.unexpected_keys or not found.missing_keys:
        return
    if set(found.missing_keys) == set(model.state_dict()) - set(adapter_tensors(model)):
        found.missing_keys.clear()
