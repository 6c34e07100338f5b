"""Find the place of a bundle's layers and tensors on a live model, and check that they fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..bundle.bundle import Bundle
from ..bundle.fingerprint import compare_weight
from ..bundle.fit import FoundLayer, FoundTensor, check_fits, fit_by_names
from ..bundle.spec import LayerSpec
from ..errors import UsageError
from ..types import Entries
from .base_linear import float_weight, is_linear, layer_device, layer_shape, to_array, to_tensor
from .modules import base_modules, did_you_mean, original
from .saved_modules import check_can_be_saved, is_container, own_state, state_tensors

log = logging.getLogger(__name__)


@dataclass
class Match:
    """Where a bundle's content belongs on a model.

    Attributes:
        bundle: bound to the model; names stay the adapter's.
        paths: name of a layer in the bundle -> its path in the model.
        saved: path of a module in the model -> the adapter's own tensors for it, by their names in
            its state dict.
    """

    bundle: Bundle
    paths: dict[str, str]
    saved: dict[str, dict[str, Tensor]]

    def layers(self) -> Iterator[tuple[str, LayerSpec, Tensor, Entries]]:
        """(path in the model, layer, spectrum (n,), entries (n, 2)) of each layer."""
        for layer in self.bundle.layers:
            spectrum = to_tensor(self.bundle.spectra[layer.name])
            yield self.paths[layer.name], layer, spectrum, self.bundle.entries(layer.name)


def match_bundle(model: nn.Module, bundle: Bundle, allow_base_mismatch: bool) -> Match:
    """Find a place on `model` for everything that `bundle` holds; nothing is changed."""
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
        check_has_values(path, modules[path])
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
    grouped = _group_by_module(modules, saved)
    for path in grouped:
        check_can_be_saved(path, modules[path])
    match = Match(replace(bundle, spec=fit.spec), paths, grouped)
    for layer in match.bundle.layers:
        match.bundle.entries(layer.name)  # raises where they are not those that the seed gives
    return match


def _group_by_module(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Put together the tensors of the largest modules of which an adapter has all tensors.

    PEFT saves a head as one module, with everything in it; a bundle holds its tensors one by one.
    Both mappings are path of a module -> tensors by their names in its state dict.
    """
    flat = {f"{path}.{leaf}" for path, held in tensors.items() for leaf in held}

    def is_whole(path: str) -> bool:
        names = state_tensors(modules[path])
        whole = bool(names) and not is_container(modules[path])
        return whole and all(f"{path}.{name}" in flat for name in names)

    grouped: dict[str, dict[str, Tensor]] = {}
    for path, held in tensors.items():
        segments = path.split(".")
        above = (".".join(segments[:i]) for i in range(1, len(segments) + 1))
        root = next(filter(is_whole, above), path)
        inside = f"{path}."[len(root) + 1 :]
        grouped.setdefault(root, {}).update({f"{inside}{leaf}": t for leaf, t in held.items()})
    return grouped


def check_has_values(path: str, module: nn.Module) -> None:
    """Refuse a module on the meta device, or whose weights accelerate keeps elsewhere."""
    check_not_offloaded(path, module)
    if layer_device(module).type == "meta":
        raise UsageError(
            f"layer {path}",
            expected="a model with weights",
            found="the meta device",
            remedy="load the weights first",
        )


def check_not_offloaded(path: str, module: nn.Module) -> None:
    """Refuse a module whose weights accelerate keeps in another place between its calls."""
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
    check_has_values(path, module)
    shape, weight = layer_shape(module), float_weight(module)
    if weight is None:
        return FoundLayer(shape)
    return FoundLayer(shape, compare=lambda wanted: compare_weight(wanted, to_array(weight)))
