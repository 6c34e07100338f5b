"""The modules of a model by their paths in the base, as if no adapter wrapped them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import UsageError
from .base_linear import without_parametrizations
from .fourier_linear import FourierLinear
from .layer_adapter import LayerAdapter
from .saved_modules import AdaptedModule, Version, unwrap, versions_of

# By their names: two of these classes are slow to import.
_WHOLE_MODEL = ("AveragedModel", "DataParallel", "DistributedDataParallel", "OptimizedModule")


def original(module: nn.Module) -> nn.Module:
    """The base's module under wrappers: adapters', torch.compile's, weight averaging, DDP's."""
    while type(module).__name__ in _WHOLE_MODEL:
        inner = module._modules.get("module", module._modules.get("_orig_mod"))
        if inner is None:
            break
        module = inner
    return unwrap(module)


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
    inner = {p: m.base_layer if isinstance(m, FourierLinear) else m for p, m in base_modules(model)}
    return {path: m for path, m in inner.items() if isinstance(m, AdaptedModule)}


def _holder(model: nn.Module, path: str) -> tuple[dict[str, nn.Module | None], str]:
    """The `_modules` that hold the module at `path`, and its name there."""
    *above, name = path.split(".")
    parent = original(model)
    for segment in above:
        parent = original(parent._modules[segment])  # type: ignore[arg-type]
    return parent._modules, name


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at `path`, whatever stood there."""
    held, name = _holder(model, path)
    held[name] = module


def ensure_fourier(model: nn.Module, path: str, module: nn.Module) -> FourierLinear:
    """The FourierLinear at `path`, put around what is there if there is none."""
    if not isinstance(module, FourierLinear):
        module = FourierLinear(module)
        put(model, path, module)
    return module


def add_saved(
    model: nn.Module, path: str, name: str, tensors: Mapping[str, Tensor], trainable: bool
) -> None:
    """Give adapter `name` its own version of the module at `path`, with copies of `tensors`."""
    held, leaf = _holder(model, path)
    module = held[leaf]
    inner = module.base_layer if isinstance(module, FourierLinear) else module
    if not isinstance(inner, AdaptedModule):
        if inner is None:
            raise KeyError(path)
        wrapper = AdaptedModule(inner)
        exchange_everywhere(model, inner, wrapper)
        inner = wrapper
    version = Version(unwrap(inner), tensors, trainable).train(inner.training)
    versions_of(inner)[name] = version


def exchange_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` at all places of the model that hold `old`: a base may use a module twice."""
    for module in list(original(model).modules()):
        for name, child in module._modules.items():
            if child is old and module is not new:
                module._modules[name] = new


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove adapter `name`; where it was the last one, put the base's own module back."""
    for adapted in adapted_modules(model).values():
        if name in versions_of(adapted):
            del versions_of(adapted)[name]
        if adapted._fourierft_active == name:
            adapted._fourierft_active = None
        if not versions_of(adapted):
            exchange_everywhere(model, adapted, unwrap(adapted))
    for path, layer in fourier_layers(model).items():
        layer.active = tuple(n for n in layer.active if n != name)
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            put(model, path, layer.base_layer)


def adapters_of(model: nn.Module, name: str) -> dict[str, LayerAdapter]:
    """Path -> adapter `name`'s share of that layer."""
    layers = fourier_layers(model).items()
    return {path: layer.adapter(name) for path, layer in layers if name in layer.adapters}


def adapter_versions(model: nn.Module, name: str) -> dict[str, Version]:
    """Path -> adapter `name`'s version of that module."""
    versions = {path: versions_of(m) for path, m in adapted_modules(model).items()}
    return {path: found[name] for path, found in versions.items() if name in found}


def saved_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Name in the base's state dict -> adapter `name`'s own tensor: its heads and biases."""
    return {
        f"{path}.{leaf}": tensor
        for path, version in adapter_versions(model, name).items()
        for leaf, tensor in version.own_tensors().items()
    }


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of a model's adapters, in the order in which they were added.

    Args:
        model: with adapters or without.
    """
    layers = fourier_layers(model).values()
    return tuple(dict.fromkeys(name for layer in layers for name in layer.adapters))


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of a model's active adapters, in the order in which they add up.

    Args:
        model: with adapters or without.
    """
    layers = fourier_layers(model).values()
    return tuple(dict.fromkeys(name for layer in layers for name in layer.active))


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` was called and `restore` was not."""
    return any(layer.is_fused for layer in fourier_layers(model).values())


def check_not_routed(model: nn.Module, where: str) -> None:
    """Raise UsageError within `route`, also of another thread: its rows name the adapters."""
    if any(layer.blocks.count for layer in fourier_layers(model).values()):
        raise UsageError(
            where, found="a model within a route block", remedy="leave the block first"
        )


def check_not_fused(model: nn.Module, where: str) -> None:
    """Raise UsageError if the model is fused."""
    if is_fused(model):
        raise UsageError(where, found="a model that is fused", remedy="call restore first")


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
    where = f"adapter {name!r}"
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        expected = "a name without dots that is no attribute of nn.ModuleDict"
        raise UsageError(where, expected=expected, remedy="choose another name")
    if name in adapter_names(model):
        found = "an adapter of that name on this model already"
        raise UsageError(where, found=found, remedy="detach it first, or give another name")
    check_not_fused(model, where)
    check_not_routed(model, where)


def base_model_name(model: nn.Module) -> str | None:
    """Name or path that transformers loaded `model` from, or None."""
    name = getattr(getattr(original(model), "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is its base with the base's own modules, as exporters need it.

    Layers whose weight torch computes (parametrizations such as weight_norm) are plain ones there.
    """
    check_not_routed(model, "export")
    adapted, layers = list(adapted_modules(model).values()), fourier_layers(model)
    plain = {path: without_parametrizations(path, unwrap(m)) for path, m in layers.items()}
    fused: dict[FourierLinear, nn.Parameter] = {}
    try:
        for layer in layers.values():
            if layer.kept_weight is not None:
                fused[layer] = layer.exchange_weight(layer.kept_weight, fuse=False)
        for module in adapted:
            exchange_everywhere(model, module, unwrap(module))
        for path, linear in plain.items():
            put(model, path, linear)
        yield
    finally:
        for path, layer in layers.items():
            put(model, path, layer)
        for module in adapted:
            exchange_everywhere(model, unwrap(module), module)
        for layer, weight in fused.items():
            layer.exchange_weight(weight, fuse=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at names that look like `name`, or nothing."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else ""
