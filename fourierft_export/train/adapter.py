"""The adapter that learns: put on the model by the settings, read and written by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapt.attach import attach, capture
from ..adapt.config import ALL_LINEAR, FourierFTConfig
from ..adapt.inject import inject
from ..adapt.linear import layer_shape, to_array, to_tensor
from ..adapt.modules import base_modules, fourier_layers, original, saved_tensors
from ..adapt.targets import USUAL_TARGETS, select
from ..bundle.file import Bundle
from ..errors import UsageError
from . import defaults
from .defaults import LayerSize
from .settings import TrainSettings
from .task import TrainingTask

NAME = "default"
_OF_A_BUNDLE = (
    "n_frequency",
    "n_frequency_pattern",
    "scaling",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "bias",
    "entry_seed",
    "init_weights",
)


@dataclass(frozen=True)
class LiveAdapter:
    """The adapter on a model that is being trained.

    Attributes:
        model: carries it under `NAME`, active, everything else frozen.
        first: the adapter as it started; says what never changes: layers, seed, scaling, and the
            fingerprints of the base.
    """

    model: nn.Module
    first: Bundle

    @property
    def spectra(self) -> dict[str, nn.Parameter]:
        """Layer -> what it learns, (n,) float32 or better."""
        return {
            path: layer.adapter(NAME).spectrum
            for path, layer in fourier_layers(self.model).items()
            if NAME in layer.adapters
        }

    @property
    def saved(self) -> dict[str, Tensor]:
        """Name -> tensor of heads and biases: parameters, and buffers that go with them."""
        return saved_tensors(self.model, NAME)

    def learning(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of all that learns, in one order everywhere."""
        found = {f"spectrum:{name}": value for name, value in self.spectra.items()}
        for name, value in self.saved.items():
            if isinstance(value, nn.Parameter) and value.requires_grad:
                found[f"saved:{name}"] = value
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Name -> live tensor, of all that a bundle holds."""
        found: dict[str, Tensor] = {f"spectrum:{n}": value for n, value in self.spectra.items()}
        return found | {f"saved:{name}": value for name, value in self.saved.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set all of `tensors()`; names and shapes must be the same."""
        for name, tensor in self.tensors().items():
            tensor.copy_(values[name])

    def load_bundle(self, bundle: Bundle) -> None:
        """Set all of `tensors()` to what a bundle of this adapter holds."""
        values = {f"spectrum:{n}": to_tensor(array) for n, array in bundle.spectra.items()}
        self.load(values | {f"saved:{n}": to_tensor(array) for n, array in bundle.saved.items()})

    def bundle(self) -> Bundle:
        """The adapter as it is now; the base's weights are not read again."""
        return Bundle.build(
            self.first.spec,
            {name: to_array(value) for name, value in self.spectra.items()},
            {name: to_array(value) for name, value in self.saved.items()},
            self.first.explicit_entries,
            where="the adapter",
        )


def new_adapter(task: TrainingTask, settings: TrainSettings) -> LiveAdapter:
    """Put an adapter on the task's model by the settings and the rules of `defaults`.

    Random starts come from torch's global CPU generator.

    Raises:
        UsageError: the settings do not fit the model.
    """
    inject(task.model, adapter_config(task, settings), NAME)
    return LiveAdapter(task.model, capture(task.model, NAME))


def adapter_config(task: TrainingTask, settings: TrainSettings) -> FourierFTConfig:
    """What to adapt and how, with every default worked out.

    Raises:
        UsageError: the settings do not fit the model.
    """
    model = task.model
    targets = settings.target_modules or task.target_modules
    if targets is None and _model_type(model) not in USUAL_TARGETS:
        targets = ALL_LINEAR

    def config(n_frequency: int, scaling: float, pattern: Mapping[str, int]) -> FourierFTConfig:
        zeros = settings.init_weights
        return FourierFTConfig(
            n_frequency=n_frequency,
            scaling=scaling,
            random_loc_seed=settings.entry_seed,
            target_modules=targets,
            exclude_modules=settings.exclude_modules,
            n_frequency_pattern=pattern,
            modules_to_save=settings.modules_to_save or task.modules_to_save or None,
            layers_to_transform=settings.layers_to_transform,
            bias=settings.bias,
            init_weights=defaults.INIT_ZEROS if zeros is None else zeros,
            task_type=task.task_type,
        )

    modules = {path: original(module) for path, module in base_modules(model)}
    shapes = {path: layer_shape(modules[path]) for path in select(model, config(1, 1, {})).targets}
    n_frequency = settings.n_frequency or defaults.n_frequency(list(shapes.values()))
    chosen = select(model, config(n_frequency, 1, settings.n_frequency_pattern)).targets
    sizes = {path: LayerSize(shapes[path], n) for path, n in chosen.items()}
    scaling = defaults.scaling(sizes) if settings.scaling is None else settings.scaling
    return config(n_frequency, scaling, settings.n_frequency_pattern)


def continued_adapter(
    task: TrainingTask, bundle: Bundle, *, allow_base_mismatch: bool = False
) -> LiveAdapter:
    """Put a bundle's adapter on the task's model, to train it further.

    Raises:
        BaseMismatchError: the bundle does not belong to the model.
    """
    attach(task.model, bundle, NAME, trainable=True, allow_base_mismatch=allow_base_mismatch)
    return LiveAdapter(task.model, capture(task.model, NAME))


def check_of_training_alone(settings: TrainSettings) -> None:
    """Refuse settings of a new adapter, where a bundle says what the adapter is.

    Raises:
        UsageError: with all of them.
    """
    plain = TrainSettings()
    clash = [name for name in _OF_A_BUNDLE if getattr(settings, name) != getattr(plain, name)]
    if clash:
        raise UsageError(
            ", ".join(clash),
            expected="settings of the training alone, since the bundle says what the adapter is",
            found=f"{len(clash)} of the adapter",
            remedy="leave them out, or train without the bundle",
        )


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None))
