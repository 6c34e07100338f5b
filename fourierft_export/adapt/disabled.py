"""The base alone, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from .active import update_learning
from .tree import adapted_modules, check_not_routed, fourier_layers

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Within the block, `model` is its base: no adapter changes it, also if it is fused.

    Afterwards, and after an exception, the same adapters are active and fused as before, and no
    others. What was detached meanwhile stays away; if it was fused, nothing is fused any more.

    Yields:
        The same model.

    Raises:
        UsageError: a `route` block is open.
    """
    check_not_routed(model, "disabled")
    layers = {m: (m.active, m.fused_weight) for m in fourier_layers(model).values()}
    modules = {m: m.active for m in adapted_modules(model).values()}
    try:
        for layer in layers:
            layer.active, layer.fused_weight = (), None
        for module in modules:
            module.active = None
        update_learning(model)
        yield model
    finally:
        whole = all(set(active) <= set(m.adapters) for m, (active, _) in layers.items())
        for layer in fourier_layers(model).values():
            active, fused = layers.get(layer, ((), None))
            layer.active = tuple(name for name in active if name in layer.adapters)
            layer.fused_weight = fused if whole else None
        for module in adapted_modules(model).values():
            name = modules.get(module)
            module.active = name if name is not None and name in module.versions else None
        update_learning(model)
