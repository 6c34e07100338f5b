"""In-memory merge, and a restore that gives back the base bit for bit.

The base's weight is kept and never written to: subtracting delta_W again would not restore it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .active import activate, update_learning
from .layer import FourierLinear
from .linear import check_mergeable, stored_weight
from .tree import active_adapters, check_known, fourier_layers, is_fused

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, names: str | Sequence[str] | None = None) -> Model:
    """Compute W + delta_W once, so that the forward pass costs what the base costs.

    The adapted layers hold both weights until `restore`; their spectra do not learn meanwhile.
    Weights tied to others (an output embedding) are changed here only.

    Args:
        model: a model with adapters; changed in place.
        names: the adapters to merge, which become the active ones; by default the active ones.

    Returns:
        The same model.

    Raises:
        UsageError: fused already; no adapter named or active; a merged weight is not finite in
            the base's dtype (float16 ends at 65,504), or a layer is quantised: all such layers
            listed, and the model unchanged.
    """
    if is_fused(model):
        raise UsageError("fuse", found="a model that is fused already", remedy="call restore first")
    wanted = active_adapters(model) if names is None else names
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    check_known(model, wanted)
    if not wanted:
        raise UsageError("fuse", expected="an adapter", found="none that is active")
    touched = {
        p: m for p, m in fourier_layers(model).items() if not set(wanted).isdisjoint(m.adapters)
    }
    check_mergeable("fuse", {path: layer.linear for path, layer in touched.items()})
    before = active_adapters(model)
    activate(model, wanted)
    layers = [(path, layer) for path, layer in fourier_layers(model).items() if layer.active]
    try:
        weights = merged_weights(dict(layers))
    except UsageError:
        activate(model, before)
        raise
    for path, layer in layers:
        layer.fused_weight = weights[path]
    update_learning(model)
    return model


def restore(model: Model) -> Model:
    """Undo `fuse`: the base's weights, bit for bit, with the same adapters active beside them.

    Raises:
        UsageError: the model is not fused.
    """
    if not is_fused(model):
        raise UsageError("restore", expected="a model that is fused", found="one that is not")
    for layer in fourier_layers(model).values():
        layer.fused_weight = None
    update_learning(model)
    return model


@torch.no_grad()
def merged_weights(layers: dict[str, FourierLinear]) -> dict[str, Tensor]:
    """Path -> W + delta_W of each layer, in the base's dtype and layout.

    Raises:
        UsageError: results that are not finite where W is, or layers with no plain float weight
            to add to (quantised ones), all listed.
    """
    check_mergeable("merged weights", {path: layer.linear for path, layer in layers.items()})
    merged = {path: layer.effective_weight().contiguous() for path, layer in layers.items()}
    broken = [
        f"{path}.weight: not finite as {weight.dtype}"
        for path, weight in merged.items()
        if not torch.isfinite(weight).all()
        and torch.isfinite(stored_weight(layers[path].linear)).all()
    ]
    if broken:
        raise UsageError(
            "merged weights",
            expected="finite numbers",
            found=f"{len(broken)} layers with infinities or NaN",
            remedy="use a wider dtype for the base, or check the adapter",
            offenders=broken,
        )
    return merged
