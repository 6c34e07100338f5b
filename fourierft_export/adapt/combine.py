"""Several adapters on a live model as one new adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from ..bundle.combine import combine_bundles
from .attach import attach, capture
from .modules import check_known, check_new_name

Model = TypeVar("Model", bound=nn.Module)


def combine(
    model: Model,
    weights: Mapping[str, float],
    name: str,
    *,
    heads: str | None = None,
    trainable: bool = False,
) -> Model:
    """Adds an adapter whose delta_W is the weighted sum of other adapters', and activates it.

    The sum is exact (`bundle.combine.combine_bundles` says how it is stored); the adapters
    themselves stay as they are, and the new one can be captured, saved and merged as any other.

    Args:
        model: changed in place.
        weights: adapter name -> finite factor; `{"a": 1, "b": -0.5}`.
        name: the new adapter's name.
        heads: saved heads and biases cannot be added. None takes each from the only adapter that
            has it; an adapter's name takes those of that one and no others; "average" takes
            means, weighted by `weights`, over the adapters that have the tensor.
        trainable: continue training it: its spectra and heads learn, the base is frozen.

    Returns:
        The same model.

    Raises:
        UsageError: an unknown name, a name that is taken, weights that are no finite numbers;
            several adapters bring a head or bias and `heads` does not say what to do; the model
            is fused, or a `route` block is open.
    """
    check_new_name(model, name)
    check_known(model, weights)
    parts = {part: capture(model, part) for part in weights}
    bundle = combine_bundles(parts, list(weights.values()), heads=heads)
    return attach(model, bundle, name, trainable=trainable)
