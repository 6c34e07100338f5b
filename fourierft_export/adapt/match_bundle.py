"""Find the place of a bundle's layers and tensors on a live model, and check that they fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..bundle.file import Bundle
from ..bundle.fingerprint import compare_weight
from ..bundle.fit import FoundLayer, FoundTensor, check_fits, fit_by_names
from ..bundle.spec import LayerSpec
from ..errors import UsageError
from ..types import Array
from .linear import float_weight, is_linear, layer_device, layer_shape, to_array, to_tensor
from .modules import base_modules, did_you_mean, original
from .saved_modules import check_can_be_saved, is_container, own_state, state_tensors

log = logging.getLogger(__name__)


@dataclass
class MatchedLayer:
    """One layer of a bundle on a model.

    Attributes:
        spec: bound to the model; the name stays the adapter's.
        spectrum: (n,), as the bundle has it.
        entries: int64 (n, 2).
    """

    spec: LayerSpec
    spectrum: Tensor
    entries: Array


@dataclass
class Match:
    """Where a bundle's content belongs on a model.

    Attributes:
        layers: path in the model -> layer.
        saved: path of a module in the model -> the adapter's own tensors for it, by their names in
            its state dict.
    """

    layers: dict[str, MatchedLayer]
    saved: dict[str, dict[str, Tensor]]


def match_bundle(model: nn.Module, bundle: Bundle, allow_base_mismatch: bool) -> Match:
    """Find a place on `model` for everything that `bundle` holds; nothing is changed.

    Raises:
        UsageError, BaseMismatchError: as in `attach`.
        BadInputError: the bundle's entries are not those that its seed gives.
    """
    modules = {path: original(module) for path, module in base_modules(model)}

    def tensor_at(name: str) -> FoundTensor | None:
        path, _, leaf = name.rpartition(".")
        there = own_state(modules[path]).get(leaf) if path in modules else None
        if there is None:
            return None
        return FoundTensor(tuple(there.shape), not there.is_floating_point())

    fit, paths, names = fit_by_names(
        bundle.spec,
        bundle.saved,
        modules,
        lambda path: _found_layer(path, modules),
        tensor_at,
        "model",
    )
    where = f"attach to {type(model).__name__}"
    check_fits(where, [fit], allow_base_mismatch=allow_base_mismatch)
    for note in fit.notes:
        log.info(note)
    saved: dict[str, dict[str, Tensor]] = {}
    for name, to in names.items():
        path, _, leaf = to.rpartition(".")
        check_not_meta(path, modules[path])
        there, value = own_state(modules[path])[leaf], to_tensor(bundle.saved[name])
        saved.setdefault(path, {})[leaf] = value.to(there.device, there.dtype)
    both = [f"{path}.weight" for path in paths.values() if "weight" in saved.get(path, ())]
    if both:
        raise UsageError(
            where,
            expected="an adapter that either replaces a weight or changes it",
            found=f"{len(both)} that it both replaces and changes",
            remedy="leave these layers out of target_modules or of modules_to_save",
            offenders=both,
        )
    grouped = group_by_module(modules, saved)
    for path in grouped:
        check_can_be_saved(path, modules[path])
    bound = replace(bundle, spec=fit.spec)
    return Match(
        {
            paths[layer.name]: MatchedLayer(
                layer, to_tensor(bundle.spectra[layer.name]), bound.entries(layer.name)
            )
            for layer in bound.layers
        },
        grouped,
    )


def group_by_module(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Put together the tensors of the largest modules of which an adapter has all tensors.

    PEFT saves a head as one module, with everything in it; a bundle holds its tensors one by one.

    Args:
        modules: path -> the base's module.
        tensors: path of the module that holds them -> tensors by name.

    Returns:
        Path -> tensors by their names in that module's state dict; no path lies within another.
    """
    flat = {f"{path}.{leaf}": t for path, held in tensors.items() for leaf, t in held.items()}
    roots: dict[str, str] = {}  # path -> the module to save for it
    for path in tensors:
        segments = path.split(".")
        above = [".".join(segments[:i]) for i in range(1, len(segments) + 1)]
        roots[path] = next((p for p in above if _is_whole(modules[p], p, flat)), path)
    grouped: dict[str, dict[str, Tensor]] = {}
    for path, held in tensors.items():
        root = roots[path]
        inside = f"{path}."[len(root) + 1 :]
        grouped.setdefault(root, {}).update({f"{inside}{leaf}": t for leaf, t in held.items()})
    return grouped


def _is_whole(module: nn.Module, path: str, flat: Mapping[str, Tensor]) -> bool:
    names = state_tensors(module)
    return bool(names) and not is_container(module) and all(f"{path}.{n}" in flat for n in names)


def check_not_meta(path: str, module: nn.Module) -> None:
    """Refuse a module without weights.

    Raises:
        UsageError: it is on the meta device, or accelerate keeps its weights elsewhere.
    """
    check_not_offloaded(path, module)
    if layer_device(module).type == "meta":
        raise UsageError(
            f"layer {path}",
            expected="a model with weights",
            found="the meta device",
            remedy="load the weights first, then attach",
        )


def check_not_offloaded(path: str, module: nn.Module) -> None:
    """Refuse a module whose weights accelerate keeps in another place between its calls.

    Raises:
        UsageError: it is such a module.
    """
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
        raise UsageError(
            f"layer {path}",
            expected="a layer whose weights stay in memory",
            found="weights that accelerate offloads (cpu_offload, disk_offload, a device map)",
            remedy="load the model without offloading, or merge the adapter into the checkpoint",
        )


def _found_layer(path: str, modules: Mapping[str, nn.Module]) -> FoundLayer | str:
    """What the model has at `path`, or why an adapter cannot sit there."""
    module = modules.get(path)
    if module is None:
        linear = [p for p, m in modules.items() if is_linear(m)]
        return f"no such layer in the model; {did_you_mean(path, linear) or 'no name is similar'}"
    if not is_linear(module):
        return f"a linear layer expected, found {type(module).__name__}"
    check_not_meta(path, module)
    weight = float_weight(module)
    if weight is None:
        return FoundLayer(layer_shape(module))
    return FoundLayer(
        layer_shape(module), compare=lambda expected: compare_weight(expected, to_array(weight))
    )
