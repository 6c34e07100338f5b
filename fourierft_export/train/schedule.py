"""How learning rates rise and fall over a run."""

from __future__ import annotations

import math


def rate_factor(step: int, steps: int, *, warmup: float, schedule: str) -> float:
    """What the peak rates are multiplied by at a step; never 0 within the run.

    Args:
        step: from 0.
        steps: of the run.
        warmup: share of the steps over which the factor rises evenly to 1.
        schedule: "linear" or "cosine" down to 0 at `steps`, or "constant".
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
