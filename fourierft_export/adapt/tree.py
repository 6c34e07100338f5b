"""The model as its base has it: paths and modules, seen through the wrappers that stand in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from torch import nn

from ..errors import UsageError
from .layer import FourierLinear
from .saved import AdaptedModule


def original(module: nn.Module) -> nn.Module:
    """The base's module under any wrappers.

    A layer may carry both kinds: FourierLinear outside, AdaptedModule inside. A whole model may be
    within DistributedDataParallel, or what torch.compile makes of it.
    """
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif type(module).__name__ == "OptimizedModule":  # its own module is slow to import
            module = module._orig_mod  # type: ignore[assignment]
        else:
            break
    if isinstance(module, FourierLinear):
        module = module.base_layer
    return module.original if isinstance(module, AdaptedModule) else module


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path in the base, module there now) in the order of `named_modules`, each module once."""
    yield from _walk(model, "", set())


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    base = original(module)
    if id(base) in seen:
        return
    seen.add(id(base))
    yield path, module
    for name, child in list(base._modules.items()):
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def fourier_layers(model: nn.Module) -> dict[str, FourierLinear]:
    """Path -> FourierLinear."""
    return {path: m for path, m in base_modules(model) if isinstance(m, FourierLinear)}


def adapted_modules(model: nn.Module) -> dict[str, AdaptedModule]:
    """Path -> AdaptedModule, those within FourierLinear layers too."""
    found = {}
    for path, module in base_modules(model):
        inner = module.base_layer if isinstance(module, FourierLinear) else module
        if isinstance(inner, AdaptedModule):
            found[path] = inner
    return found


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The base's module that holds `path`, and the name it holds it under."""
    *above, name = path.split(".")
    parent = original(model)
    for segment in above:
        child = parent._modules[segment]
        if child is None:
            raise KeyError(path)
        parent = original(child)
    return parent, name


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at `path`, whatever stood there."""
    parent, name = parent_of(model, path)
    parent._modules[name] = module


def ensure_fourier(model: nn.Module, path: str, module: nn.Module) -> FourierLinear:
    """The FourierLinear at `path`, put around what is there if there is none."""
    if not isinstance(module, FourierLinear):
        module = FourierLinear(module)
        put(model, path, module)
    return module


def ensure_adapted(model: nn.Module, path: str) -> AdaptedModule:
    """The AdaptedModule at `path`, put around the base's module if there is none."""
    parent, name = parent_of(model, path)
    module = parent._modules[name]
    if module is None:
        raise KeyError(path)
    inner = module.base_layer if isinstance(module, FourierLinear) else module
    if isinstance(inner, AdaptedModule):
        return inner
    adapted = AdaptedModule(inner)
    if isinstance(module, FourierLinear):
        module.base_layer = adapted
    else:
        parent._modules[name] = adapted
    return adapted


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters on `model`, in the order they came."""
    names: dict[str, None] = {}
    for layer in fourier_layers(model).values():
        names.update(dict.fromkeys(layer.adapters))
    return tuple(names)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that are active, in the order they add up."""
    names: dict[str, None] = {}
    for layer in fourier_layers(model).values():
        names.update(dict.fromkeys(layer.active))
    return tuple(names)


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` was called and `restore` was not."""
    return any(layer.fused_weight is not None for layer in fourier_layers(model).values())


def check_not_routed(model: nn.Module, where: str) -> None:
    """Raise UsageError within `route`: its rows refer to the adapters as they were."""
    routings = [m.routing for m in fourier_layers(model).values()]
    if any(routing is not None and routing.now is not None for routing in routings):
        raise UsageError(
            where, found="a model within a route block", remedy="leave the block first"
        )


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UsageError for names that no adapter on `model` has, with the ones that there are."""
    known = adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            "adapter " + ", ".join(repr(name) for name in unknown),
            expected=f"one of {', '.join(known)}" if known else "a model with adapters",
            found="no adapter of that name on this model",
            remedy=did_you_mean(unknown[0], known) or "attach or inject it first",
        )


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise UsageError unless `name` can become an adapter's name on `model` now."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise UsageError(
            f"adapter {name!r}",
            expected="a name without dots that is no method of a dictionary",
            remedy="choose another name",
        )
    if name in adapter_names(model):
        raise UsageError(
            f"adapter {name!r}",
            found="an adapter of that name on this model already",
            remedy="detach it first, or give another name",
        )
    if is_fused(model):
        raise UsageError(
            f"adapter {name!r}", found="a model that is fused", remedy="call restore first"
        )
    check_not_routed(model, f"adapter {name!r}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at names that look like `name`, or nothing."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else ""
