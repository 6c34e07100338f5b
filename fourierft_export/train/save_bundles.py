"""Training with accelerate and without the Trainer: `save_state` without a copy of the base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..adapt.modules import adapter_names
from ..bundle.file import SUFFIX, Bundle
from ..errors import UsageError
from .adapter import LiveAdapter, adapter_tensors, check_only_learns
from .callback import write_adapter


@dataclass(frozen=True)
class BundleState:
    """What `save_bundles` has registered; `remove` takes it back."""

    handles: tuple[Any, ...]

    def remove(self) -> None:
        """Let the accelerator save whole models again."""
        for handle in self.handles:
            handle.remove()


def save_bundles(accelerator: Any, name: str = "default") -> BundleState:
    """Makes accelerate's `save_state` and `load_state` write and read an adapter, not its model.

    Call it once, before the first of them. A folder that `save_state` makes then holds
    `NAME.fourierft.safetensors` and the optimizer's and the generators' states. Models without
    such an adapter are saved whole. To save the adapter alone there is
    `ff.capture(accelerator.unwrap_model(model)).save(path)`.

    Args:
        accelerator: accelerate's; with models prepared before or after.
        name: the adapter that is trained.

    Returns:
        A handle; its `remove` lets the accelerator save whole models again.

    Raises:
        UsageError: in `save_state`: other parameters than the adapter's learn, two models have an
            adapter of that name, or accelerate splits tensors (FSDP, DeepSpeed).
        BaseMismatchError: in `load_state`: the bundle is of another adapter or base.
    """
    file = f"{name}{SUFFIX}"

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for _, model in _adapted(models):
            adapter = LiveAdapter.of(model, name)
            check_only_learns(adapter)
            # By its names: hooks of other adapters may have taken their models' weights already.
            own = adapter_tensors(model)
            place = next((i for i, found in enumerate(weights) if _holds(found, own)), None)
            if place is None:
                raise UsageError(
                    "accelerator.save_state",
                    expected="models that every process holds whole",
                    found=f"distributed type {accelerator.distributed_type}",
                    remedy="remove the hooks, and save the model in accelerate's own way",
                )
            del weights[place]
            if accelerator.is_main_process:
                write_adapter(adapter, folder, file)

    def load(models: list[nn.Module], folder: str) -> None:
        for index, model in _adapted(models):
            LiveAdapter.of(model, name).load(Bundle.load(Path(folder) / file))
            del models[index]

    def _adapted(models: list[nn.Module]) -> list[tuple[int, nn.Module]]:
        plain = [accelerator.unwrap_model(model) for model in models]
        found = [(i, model) for i, model in enumerate(plain) if name in adapter_names(model)]
        if len(found) > 1:
            raise UsageError(
                "save_bundles",
                expected=f"one model with an adapter {name!r}",
                found=f"{len(found)} of them",
                remedy="give the adapters names of their own, and register each",
            )
        return found

    return BundleState(
        (
            accelerator.register_save_state_pre_hook(save),
            accelerator.register_load_state_pre_hook(load),
        )
    )


def _holds(weights: Iterable[str], names: Iterable[str]) -> bool:
    """Whether a state dict has all these names, under whatever prefix a wrapper gave them."""
    there = [f".{key}" for key in weights]
    return all(any(key.endswith(f".{name}") for key in there) for name in names)
