"""The values that the rules of `defaults` choose, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import defaults
from .defaults import LayerSize
from .settings import TrainSettings

if TYPE_CHECKING:
    from torch import nn

    from .task import TrainingTask


def suggest(
    model_or_shapes: nn.Module | Sequence[tuple[int, int]],
    n_frequency: int | None = None,
    steps: int | None = None,
    *,
    target_modules: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Suggests settings for FourierFT, to be used with PEFT and any trainer.

        found = ff.suggest(model, steps=500)
        learning_rate = found.pop("learning_rate")
        config = peft.FourierFTConfig(target_modules=["query", "value"], **found)

    A spectrum needs a far larger learning rate than weights do; how large follows from the shapes
    of the layers, `scaling` and `n_frequency`. Heads learn at a rate of their own, 0.005 here.

    Args:
        model_or_shapes: a model without adapters, or (out_features, in_features) of each layer
            that is adapted.
        n_frequency: coefficients per layer; by default 1000, or less for small layers.
        steps: of the run, if known: longer runs learn at a lower rate.
        target_modules: the layers of a model, in PEFT's terms; by default the architecture's.

    Returns:
        `n_frequency`, `scaling`, `init_weights` (True, start at zero) and `learning_rate`, the
        highest rate of the coefficients, for AdamW, batches of about 32 rows, and a rate that
        falls to zero, as the Trainer's does unless told otherwise.

    Raises:
        UsageError: values out of range; nothing in the model is adapted.
    """
    targets = target_modules if isinstance(target_modules, str | None) else tuple(target_modules)
    settings = TrainSettings(
        n_frequency=n_frequency, target_modules=targets, steps=steps, schedule="linear"
    )
    if isinstance(model_or_shapes, Sequence):
        shapes = [(int(rows), int(columns)) for rows, columns in model_or_shapes]
        n = settings.n_frequency or defaults.n_frequency(shapes)
        sizes = {str(i): LayerSize(shape, n) for i, shape in enumerate(shapes)}
        return _values(n, defaults.scaling(sizes), sizes, settings)
    from .task import TrainingTask

    return choose_values(TrainingTask(model_or_shapes, ()), settings)


def choose_values(task: TrainingTask, settings: TrainSettings) -> dict[str, Any]:
    """The values for a task and its settings, which say the schedule and the steps."""
    from .live_adapter import choose_config

    config, sizes = choose_config(task, settings)
    found = _values(config.n_frequency, config.scaling, sizes, settings)
    pattern = dict(config.n_frequency_pattern or {})
    return found | ({"n_frequency_pattern": pattern} if pattern else {})


def _values(
    n_frequency: int, scaling: float, sizes: dict[str, LayerSize], settings: TrainSettings
) -> dict[str, Any]:
    rates = defaults.spectrum_rates(
        sizes,
        scaling,
        settings.learning_rate,
        steps=settings.steps,
        schedule=settings.schedule,
        same=True,
    )
    return {
        "n_frequency": n_frequency,
        "scaling": scaling,
        "init_weights": settings.init_weights,
        "learning_rate": float(f"{next(iter(rates.values())):.{defaults.SCALING_DIGITS}g}"),
    }
