"""The factors by which several bundles count."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import UsageError


def checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite factor for each of `count` bundles.

    Args:
        weights: as they were given; None for 1 each.
        count: how many bundles there are.

    Raises:
        UsageError: another number of weights, or one that is not finite.
    """
    if weights is None:
        return (1.0,) * count
    factors = tuple(float(weight) for weight in weights)
    if len(factors) != count or not all(map(math.isfinite, factors)):
        raise UsageError(
            "weights (--weight)",
            expected=f"finite numbers, one for each of {count} bundle(s)",
            found=", ".join(map(str, factors)) or "none",
        )
    return factors
