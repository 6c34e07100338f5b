"""The adapter that learns: put on the model by the settings, read, written and compared by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.attach import capture
from ..adapt.base_linear import layer_shape, to_array, to_tensor
from ..adapt.config import ALL_LINEAR, FourierFTConfig
from ..adapt.layer_adapter import LayerAdapter
from ..adapt.modules import (
    active_adapters,
    adapters_of,
    base_modules,
    check_known,
    original,
    saved_tensors,
)
from ..adapt.saved_modules import Version
from ..adapt.targets import USUAL_TARGETS, select
from ..bundle.bundle import Bundle
from ..errors import BaseMismatchError, UsageError
from . import defaults
from .defaults import LayerSize
from .settings import TrainSettings
from .task import TrainingTask

NAME = "default"
COPIED = ("exclude_modules", "layers_to_transform", "bias", "init_weights")
Identity = dict[str, Any]


@dataclass(frozen=True)
class LiveAdapter:
    """An adapter on a model that is being trained."""

    model: nn.Module
    name: str
    # The adapter as it started. It says what never changes: layers, seed, scaling and the base's
    # fingerprints, so that the base's weights are hashed only once.
    first: Bundle

    @classmethod
    def of(cls, model: nn.Module, name: str = NAME) -> LiveAdapter:
        """The adapter `name` that is on `model`."""
        return cls(model, name, capture(model, name))

    @property
    def spectra(self) -> dict[str, nn.Parameter]:
        """Layer -> its spectrum, (n,) float32 or better."""
        found = adapters_of(self.model, self.name)
        return {path: adapter.spectrum for path, adapter in found.items()}

    @property
    def saved(self) -> dict[str, Tensor]:
        """Name -> tensor of heads and biases: parameters, and buffers that go with them."""
        return saved_tensors(self.model, self.name)

    def learning(self) -> list[nn.Parameter]:
        """All that learns."""
        saved = [t for t in self.saved.values() if isinstance(t, nn.Parameter)]
        return [p for p in (*self.spectra.values(), *saved) if p.requires_grad]

    def bundle(self) -> Bundle:
        """The adapter as it is now. Sharded tensors are gathered: every process must call it."""
        return Bundle.build(
            self.first.spec,
            {name: to_array(value) for name, value in self.spectra.items()},
            {name: to_array(value) for name, value in self.saved.items()},
            self.first.explicit_entries,
            where="the adapter",
        )

    @torch.no_grad()
    def load(self, bundle: Bundle) -> None:
        """Copy the numbers of a bundle of this adapter into the live parameters."""
        check_same_adapter(identity(bundle), identity(self.first), f"adapter {self.name!r}")
        for live, stored in ((self.spectra, bundle.spectra), (self.saved, bundle.saved)):
            for key, tensor in live.items():
                values, mesh = to_tensor(stored[key]), getattr(tensor, "device_mesh", None)
                if mesh is not None:
                    from torch.distributed.tensor import distribute_tensor

                    sharded: Any = tensor
                    values = distribute_tensor(values.to(tensor.device), mesh, sharded.placements)
                tensor.copy_(values)


def choose_config(
    task: TrainingTask, settings: TrainSettings
) -> tuple[FourierFTConfig, dict[str, LayerSize]]:
    """The adapter of the settings and the rules of `defaults`, and the layers that it adapts."""
    model = task.model
    targets = settings.target_modules or task.target_modules
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if targets is None and kind not in USUAL_TARGETS:
        targets = ALL_LINEAR

    def config(n_frequency: int, scaling: float, pattern: Mapping[str, int]) -> FourierFTConfig:
        return FourierFTConfig(
            n_frequency=n_frequency,
            scaling=scaling,
            n_frequency_pattern=pattern,
            random_loc_seed=settings.entry_seed,
            target_modules=targets,
            modules_to_save=settings.modules_to_save or task.modules_to_save or None,
            task_type=task.task_type,
            **{name: getattr(settings, name) for name in COPIED},
        )

    modules = {path: original(module) for path, module in base_modules(model)}
    shapes = {path: layer_shape(modules[path]) for path in select(model, config(1, 1, {})).targets}
    n_frequency = settings.n_frequency or defaults.n_frequency(list(shapes.values()))
    pattern = settings.n_frequency_pattern
    if settings.budget is not None:
        if settings.budget < len(shapes):
            expected = f"at least 1 for each of {len(shapes)} layers"
            raise UsageError("budget", expected=expected, found=str(settings.budget))
        counts = defaults.spend(settings.budget, shapes)
        n_frequency = max(counts.values())
        pattern = {path: n for path, n in counts.items() if n < n_frequency}
    chosen = select(model, config(n_frequency, 1, pattern)).targets
    sizes = {path: LayerSize(shapes[path], n) for path, n in chosen.items()}
    scaling = defaults.scaling(sizes) if settings.scaling is None else settings.scaling
    return config(n_frequency, scaling, pattern), sizes


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name in `model.state_dict()` -> tensor, of all adapters on it: spectra, heads, biases."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, LayerAdapter):
            found[f"{path}.spectrum"] = module.spectrum
        elif isinstance(module, Version):
            for leaf, tensor in module.own_tensors().items():
                found[f"{path}.module.{leaf}"] = tensor
    return found


def check_only_learns(adapter: LiveAdapter) -> None:
    """Raise unless the adapter learns and nothing else does: its bundle would not hold that."""
    name, model = adapter.name, adapter.model
    check_known(model, [name])
    learns = any(spectrum.requires_grad for spectrum in adapter.spectra.values())
    if not learns or name not in active_adapters(model):
        raise UsageError(
            f"adapter {name!r}",
            expected="an active adapter that learns",
            found="one that does not",
            remedy="activate it; attach it with trainable=True; call restore if it is fused",
        )
    own = {id(tensor) for tensor in (*adapter.spectra.values(), *adapter.saved.values())}
    more = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if more:
        raise UsageError(
            f"adapter {name!r}",
            expected="a model where only the adapter learns, since its bundle holds nothing else",
            found=f"{len(more)} more parameters with requires_grad",
            remedy="name their modules in modules_to_save, or freeze them",
            offenders=more,
        )


def identity(bundle: Bundle) -> Identity:
    """What must be the same to resume a run: all of a bundle but the numbers learnt."""
    hashed = hashlib.sha256()
    for layer in bundle.layers:
        print_ = layer.fingerprint
        known = (layer.name, layer.shape, layer.entries_sha256)
        hashed.update(repr((known, print_ and (print_.dtype, print_.digest.hex()))).encode())
    return {
        "seed": bundle.spec.seed,
        "scaling": bundle.spec.scaling,
        "layers": len(bundle.layers),
        "saved": {name: list(bundle.saved[name].shape) for name in sorted(bundle.saved)},
        "base": hashed.hexdigest(),
    }


def check_same_adapter(before: Identity, now: Identity, where: str) -> None:
    """Refuse to resume with another adapter or base than the checkpoint's."""
    differs = [
        "base: other weights, layers or entries than the checkpoint's"
        if key == "base"
        else f"{key}: {before.get(key)!r} in the checkpoint, {value!r} now"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if differs:
        raise BaseMismatchError(
            where,
            expected="one of the same adapter on the same base",
            found=f"{len(differs)} differences",
            remedy="resume with the model and the FourierFTConfig that the run began with",
            offenders=differs,
        )
