"""In-memory merge: W + delta_W computed once, then undone or kept permanently.

`fuse` keeps the base's weight: subtracting delta_W again would not restore it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..spectral import torch_ops
from . import modules
from .active import activate, update_learning
from .attach import detach
from .base_linear import check_mergeable, stored_weight
from .fourier_linear import FourierLinear
from .saved_modules import versions_of

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, names: str | Sequence[str] | None = None) -> Model:
    """Computes W + delta_W once, so that a forward pass costs no more than the base's.

    Each adapted layer runs its own forward and hooks on the merged weight, and holds both weights
    until `restore`. Nothing of the adapters learns meanwhile, state dicts hold the base's
    weights, and `load_state_dict` is refused. Weights tied to others (an output embedding) are
    changed here only.

    Args:
        model: a model with adapters; changed in place.
        names: the adapters to merge, which become the active ones; by default the active ones.

    Returns:
        The same model.

    Raises:
        UsageError: fused already; no adapter named or active; a merged weight is not finite in
            the base's dtype (float16 ends at 65,504); a layer is quantised, its weight is computed
            from others, or it occurs at several places in the model: all such layers listed, and
            the model unchanged.

    Example:
        >>> import fourierft_export as ff, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> model = ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> x = torch.rand(2, 8)
        >>> adapted = model(x)
        >>> torch.allclose(ff.fuse(model)(x), adapted, atol=1e-5)
        True
        >>> model = ff.restore(model)
    """
    layers, weights = _merge(model, names, "fuse")
    for path, layer in layers.items():
        layer.exchange_weight(nn.Parameter(weights[path], requires_grad=False), fuse=True)
    update_learning(model)
    return model


def restore(model: Model) -> Model:
    """Undoes `fuse`: gives the base's weights back bit for bit; the same adapters stay active.

    Args:
        model: a fused model; changed in place.

    Returns:
        The same model.

    Raises:
        UsageError: the model is not fused.
    """
    if not modules.is_fused(model):
        raise UsageError("restore", expected="a model that is fused", found="one that is not")
    for layer in modules.fourier_layers(model).values():
        if layer.kept_weight is not None:
            layer.exchange_weight(layer.kept_weight, fuse=False)
    update_learning(model)
    return model


@torch.no_grad()
def unload(model: Model, merge: bool = False) -> Model:
    """Takes all adapters off a model; with `merge`, keeps the effect of the active ones.

    Merging adds delta_W to the base's own weights in place, without a second copy of them where
    they cannot overflow, and gives the modules that adapters saved to the model for good.

    Args:
        model: changed in place.
        merge: merge the active adapters first; otherwise the base is as it was.

    Returns:
        The same model, without wrappers: `save_pretrained` writes it as any other.

    Raises:
        UsageError: with `merge`: no adapter is active, or layers cannot be merged (not finite,
            quantised, shared), all of them listed; the model is unchanged then.
    """
    modules.check_not_routed(model, "unload")
    if not merge:
        return detach(model)
    if modules.is_fused(model):
        layers = {path: m for path, m in modules.fourier_layers(model).items() if m.is_fused}
        weights = {path: stored_weight(layer.linear) for path, layer in layers.items()}
    else:
        _, weights = _merge(model, None, "unload", in_place=True)
    versions = {
        path: versions_of(module)[module._fourierft_active]
        for path, module in modules.adapted_modules(model).items()
        if module._fourierft_active is not None
    }
    detach(model)
    bases = dict(modules.base_modules(model))
    for path, weight in weights.items():
        parameters = bases[path]._parameters
        learns = parameters["weight"].requires_grad  # type: ignore[union-attr]
        parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=learns)
    for path, version in versions.items():
        learning = {n for n, p in bases[path].named_parameters() if p.requires_grad}
        for name, tensor in version.own_tensors().items():
            tensor.requires_grad_(name in learning)
        if version.is_whole:
            modules.exchange_everywhere(model, bases[path], version.module)
        else:
            bases[path]._parameters.update(version.own_tensors())  # type: ignore[arg-type]
    return model


@torch.no_grad()
def _merge(
    model: nn.Module, names: str | Sequence[str] | None, where: str, in_place: bool = False
) -> tuple[dict[str, FourierLinear], dict[str, Tensor]]:
    """Activate the adapters to merge, and compute W + delta_W in the base's dtype and layout.

    Layers of one shape and dtype whose adapters share entries are done together. With `in_place`,
    weights that are not tied and cannot overflow are changed themselves, after all checks; the
    others are returned by path. If anything is refused, the model is unchanged.
    """
    modules.check_not_fused(model, where)
    before = modules.active_adapters(model)
    wanted = before if names is None else (names,) if isinstance(names, str) else tuple(names)
    modules.check_known(model, wanted)
    if not wanted:
        raise UsageError(where, expected="an adapter", found="none that is active")
    layers = {
        path: layer
        for path, layer in modules.fourier_layers(model).items()
        if not set(wanted).isdisjoint(layer.adapters)
    }
    _check_layers(model, where, layers)
    activate(model, wanted)
    in_base = {}
    if in_place:
        bases = [modules.original(module) for _, module in modules.base_modules(model)]
        uses = Counter(id(p) for module in bases for p in module._parameters.values())
        in_base = {
            path: layer
            for path, layer in layers.items()
            if uses[id(modules.original(layer)._parameters["weight"])] == 1
            and _cannot_overflow(layer)
        }
    apart = {path: layer for path, layer in layers.items() if path not in in_base}
    merged = _merge_together(apart)
    merged |= {p: m.effective_weight().contiguous() for p, m in apart.items() if p not in merged}
    broken = [
        f"{path}.weight: not finite as {weight.dtype}"
        for path, weight in merged.items()
        if not weight.isfinite().all() and stored_weight(layers[path].linear).isfinite().all()
    ]
    if broken:
        activate(model, before)
        raise UsageError(
            "merged weights",
            expected="finite numbers",
            found=f"{len(broken)} layers with infinities or NaN",
            remedy="use a wider dtype for the base, or check the adapter",
            offenders=broken,
        )
    _merge_together(in_base, in_place=True)
    return layers, merged


def _check_layers(model: nn.Module, where: str, layers: dict[str, FourierLinear]) -> None:
    """Refuse layers whose weight cannot be exchanged, or that occur at other places, too."""
    plain = {path: modules.original(layer) for path, layer in layers.items()}
    check_mergeable(where, plain, parameters=True)
    places = Counter(
        id(m) for one in modules.original(model).modules() for m in one._modules.values()
    )
    shared = [path for path, linear in plain.items() if places[id(linear)] > 1]
    if shared:
        raise UsageError(
            where,
            expected="layers that occur once in the model",
            found=f"{len(shared)} that occur at other paths as well, without an adapter",
            remedy="put a copy of the layer at each path",
            offenders=shared,
        )


def _merge_together(layers: dict[str, FourierLinear], in_place: bool = False) -> dict[str, Tensor]:
    """Path -> W + delta_W of the layers under one adapter; those that share entries at once."""
    groups: dict[object, list[str]] = {}
    for path, layer in layers.items():
        if len(layer.active) == 1:
            adapter, weight = layer.adapter(layer.active[0]), stored_weight(layer.linear)
            key = (
                *(layer.shape, layer.transposed, weight.dtype, weight.device),
                *(adapter.spectrum.dtype, adapter.origin.scaling, adapter.host_entries.tobytes()),
            )
            groups.setdefault(key, []).append(path)
    merged: dict[str, Tensor] = {}
    for paths in groups.values():
        group = [layers[path] for path in paths]
        adapters = [layer.adapter(layer.active[0]) for layer in group]
        sums = torch_ops.merge_delta_weights(
            [stored_weight(layer.linear).detach() for layer in group],
            [adapter.spectrum.detach() for adapter in adapters],
            adapters[0].entries,
            adapters[0].origin.scaling,
            transposed=group[0].transposed,
            in_place=in_place,
        )
        merged.update(zip(paths, sums, strict=True))
    return merged


def _cannot_overflow(layer: FourierLinear) -> bool:
    """Whether W + delta_W is finite in the weight's dtype wherever W is, without computing it."""
    if len(layer.active) != 1 or stored_weight(layer.linear).dtype == torch.float16:
        return False
    adapter = layer.adapter(layer.active[0])
    total = adapter.spectrum.double().abs().sum() * abs(adapter.origin.scaling)
    return bool(total / (layer.shape[0] * layer.shape[1]) < 1e30)
