"""The adapted model with the base's module tree for a while: what an exporter must see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from .layer import FourierLinear
from .saved import AdaptedModule
from .tree import base_modules, check_not_routed, put


@contextmanager
def swapped_layers(
    model: nn.Module, build: Callable[[str, FourierLinear], nn.Module]
) -> Iterator[Mapping[str, nn.Module]]:
    """Within the block, what `build(path, layer)` makes stands for every `FourierLinear`.

    Modules with versions are their active version. Everything is put back afterwards.

    Yields:
        Path -> what was built.

    Raises:
        UsageError: a `route` block is open.
    """
    check_not_routed(model, "plain modules")
    wrappers = {
        path: module
        for path, module in base_modules(model)
        if isinstance(module, FourierLinear | AdaptedModule)
    }
    stand_ins = {
        path: build(path, module) if isinstance(module, FourierLinear) else module.chosen
        for path, module in wrappers.items()
    }
    try:
        for path, stand_in in stand_ins.items():
            put(model, path, stand_in)
        yield {p: m for p, m in stand_ins.items() if isinstance(wrappers[p], FourierLinear)}
    finally:
        for path, wrapper in wrappers.items():
            put(model, path, wrapper)


def with_weight(linear: nn.Module, weight: Tensor) -> nn.Module:
    """A shallow copy of a layer with another weight, which does not learn."""
    plain = copy.copy(linear)
    plain._parameters = dict(linear._parameters)
    plain._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return plain
