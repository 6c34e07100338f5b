"""The adapter on a live model, as far as saving and resuming a training run needs it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.adapter import LayerAdapter
from ..adapt.attach import capture
from ..adapt.linear import to_tensor
from ..adapt.modules import active_adapters, check_known, fourier_layers, saved_tensors
from ..adapt.saved_modules import Version
from ..bundle.file import Bundle
from ..bundle.fingerprint import judge
from ..bundle.spec import LayerSpec
from ..errors import BaseMismatchError, UsageError

Identity = dict[str, Any]


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


def check_only_learns(model: nn.Module, name: str) -> None:
    """Raise unless adapter `name` learns and nothing else does: its bundle would not hold that.

    Raises:
        UsageError: no such adapter, an idle or frozen one, or other parameters that learn (all of
            them listed).
    """
    check_known(model, [name])
    own = {
        id(layer.adapter(name).spectrum)
        for layer in fourier_layers(model).values()
        if name in layer.adapters
    }
    learns = any(id(p) in own and p.requires_grad for p in model.parameters())
    if not learns or name not in active_adapters(model):
        raise UsageError(
            f"adapter {name!r}",
            expected="an active adapter that learns",
            found="one that does not",
            remedy="activate it; attach it with trainable=True; call restore if it is fused",
        )
    own |= {id(tensor) for tensor in saved_tensors(model, name).values()}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise UsageError(
            f"adapter {name!r}",
            expected="nothing besides it that learns, for its bundle holds nothing else",
            found=f"{len(others)} more parameters that ask for gradients",
            remedy="name their modules in modules_to_save, or freeze them",
            offenders=others,
        )


def identity(bundle: Bundle) -> Identity:
    """What must be the same for a run to go on: everything in a bundle but the numbers learnt."""
    hashed = hashlib.sha256()
    for layer in bundle.layers:
        print_ = layer.fingerprint
        known = (layer.name, layer.shape, layer.entries_sha256)
        hashed.update(repr((known, print_ and (print_.dtype, print_.digest.hex()))).encode())
    return {
        "seed": bundle.spec.seed,
        "scaling": bundle.spec.scaling,
        "layers": len(bundle.layers),
        "saved": sorted(bundle.saved),
        "base": hashed.hexdigest(),
    }


def check_same_run(before: Identity, now: Identity) -> None:
    """Refuse to go on with another adapter, or on another base, than the checkpoint's.

    Raises:
        BaseMismatchError: with what differs.
    """
    differs = [
        f"{key}: {before.get(key)!r} in the checkpoint, {value!r} now"
        if key != "base"
        else "base: other weights, layers or entries than the checkpoint's"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if differs:
        raise BaseMismatchError(
            "checkpoint to resume from",
            expected="one of the same adapter on the same base",
            found=f"{len(differs)} differences",
            remedy="resume with the model and the FourierFTConfig that the run began with",
            offenders=differs,
        )


@torch.no_grad()
def refill(model: nn.Module, bundle: Bundle, name: str = "default") -> None:
    """Put a bundle's numbers into adapter `name`, which is on `model` already.

    The parameters stay the same objects, so that an optimizer goes on with them.

    Args:
        model: the model that the bundle was captured from, or one made in the same way.
        bundle: with the layers and tensors that the adapter has.
        name: the adapter.

    Raises:
        UsageError: no adapter of that name.
        BaseMismatchError: the bundle is of another adapter or base: all differences listed, the
            model unchanged.
    """
    live = capture(model, name)
    wrong = _differences(live, bundle)
    if wrong:
        raise BaseMismatchError(
            f"adapter {name!r}",
            expected="the bundle of the same adapter on the same base",
            found=f"{len(wrong)} differences",
            remedy="make the model and its adapter as they were when the bundle was saved",
            offenders=wrong,
        )
    for path, layer in fourier_layers(model).items():
        if name in layer.adapters:
            layer.adapter(name).spectrum.copy_(to_tensor(bundle.spectra[path]))
    for key, tensor in saved_tensors(model, name).items():
        tensor.copy_(to_tensor(bundle.saved[key]))


def _differences(live: Bundle, stored: Bundle) -> list[str]:
    wrong = [
        f"{field}: {getattr(stored.spec, field)!r} in the bundle, {getattr(live.spec, field)!r} now"
        for field in ("seed", "scaling")
        if getattr(stored.spec, field) != getattr(live.spec, field)
    ]
    there = {layer.name: layer for layer in stored.layers}
    for layer in live.layers:
        other = there.pop(layer.name, None)
        wrong += [f"{layer.name}: {what}" for what in _layer_differences(layer, other)]
    wrong += [f"{extra}: not adapted in this model" for extra in there]
    for tensor in sorted({*live.saved, *stored.saved}):
        shapes = [
            list(b.saved[tensor].shape) if tensor in b.saved else None for b in (stored, live)
        ]
        if shapes[0] != shapes[1]:
            wrong.append(f"{tensor}: shape {shapes[0]} in the bundle, {shapes[1]} now")
    return wrong


def _layer_differences(live: LayerSpec, stored: LayerSpec | None) -> list[str]:
    if stored is None:
        return ["not in the bundle"]
    wrong = []
    if stored.n_frequency != live.n_frequency:
        wrong.append(f"n_frequency {stored.n_frequency} in the bundle, {live.n_frequency} now")
    elif stored.is_bound and stored.entries_sha256 != live.entries_sha256:
        wrong.append("other entries")
    if stored.is_bound and stored.shape != live.shape:
        wrong.append(f"shape {stored.shape} in the bundle, {live.shape} now")
    elif stored.fingerprint and live.fingerprint:
        verdict = judge(stored.fingerprint, live.fingerprint)
        wrong += ["another base weight"] * (verdict == "different")
    return wrong
