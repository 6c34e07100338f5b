"""Which tensors learn at which rate: spectra, by their layers' shapes, apart from heads and biases.

A coefficient and a head's weight move on other scales, so that one learning rate does not fit both.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapt.modules import fourier_layers
from ..errors import UsageError
from .defaults import HEAD_LEARNING_RATE, LayerSize, spectrum_rates


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    spectrum_weight_decay: float = 0.0,
    same_rate: bool = False,
    steps: int | None = None,
    schedule: str = "linear",
) -> list[dict[str, Any]]:
    """Groups the parameters of `model` that learn, for an optimizer of torch.

    For example `torch.optim.AdamW(parameter_groups(model))`. Every group has `params`, `lr`,
    `weight_decay`, and `name`: "spectrum" (a group for each rate), "head" (matrices), "vector"
    (their biases, which do not decay).

    Args:
        model: with an adapter that learns.
        learning_rate: of the spectra, for the adapter's median layer; by default the one that suits
            its scaling, shapes and n (`defaults.spectrum_rates`).
        head_learning_rate: of everything else that learns; by default `defaults`' constant.
        weight_decay: of heads' matrices.
        spectrum_weight_decay: of the spectra.
        same_rate: give every layer the same rate, rather than the one at which all layers'
            delta_W change alike.
        steps: of the run, if known: longer runs learn at a lower rate by default.
        schedule: of the rates, "linear" or "cosine", which fall to zero, or "constant", as in a
            loop without a schedule: a constant rate is by default half of the others' highest.

    Returns:
        The groups, as torch's optimizers take them.

    Raises:
        UsageError: no spectrum learns.
    """
    spectra = {
        f"{path}/{name}": layer.adapter(name)
        for path, layer in fourier_layers(model).items()
        for name in layer.adapters
        if layer.adapter(name).spectrum.requires_grad
    }
    if not spectra:
        raise UsageError(
            "parameter_groups",
            expected="a model with an adapter that learns",
            found="no spectrum that asks for a gradient",
            remedy="inject an adapter first, or attach one with trainable=True, and activate it",
        )
    groups: list[tuple[str, list[nn.Parameter], float, float]] = []
    for scaling in dict.fromkeys(adapter.origin.scaling for adapter in spectra.values()):
        one = {path: a for path, a in spectra.items() if a.origin.scaling == scaling}
        sizes = {path: LayerSize(a.shape, a.n_frequency) for path, a in one.items()}
        rates = spectrum_rates(
            sizes, scaling, learning_rate, steps=steps, schedule=schedule, same=same_rate
        )
        for rate in dict.fromkeys(rates.values()):
            tensors = [adapter.spectrum for path, adapter in one.items() if rates[path] == rate]
            groups.append(("spectrum", tensors, rate, spectrum_weight_decay))
    known = {id(adapter.spectrum) for adapter in spectra.values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    rate = HEAD_LEARNING_RATE if head_learning_rate is None else head_learning_rate
    groups.append(("head", [p for p in others if p.ndim > 1], rate, weight_decay))
    groups.append(("vector", [p for p in others if p.ndim < 2], rate, 0.0))
    names = ("name", "params", "lr", "weight_decay")
    return [dict(zip(names, group, strict=True)) for group in groups if group[1]]
