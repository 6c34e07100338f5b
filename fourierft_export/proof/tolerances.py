"""How far two artifacts may be apart, by the precision of the coarser one.

Two criteria have to hold at once. `scale` bounds the largest difference against the size of the
output: that is what a user notices. But an adapter may change the outputs so little that being
wrong about it stays below any such bound; so `effect` bounds the difference against what the
adapter itself changes. A delta that is 1 % too large moves the outputs by about 1 % of the
adapter's effect, five times what `effect` allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import UsageError

PRECISIONS = ("float64", "float32", "float16", "bfloat16", "int8")
"""From fine to coarse; "int8" stands for every quantised form."""


@dataclass(frozen=True)
class Tolerance:
    """What is allowed between two sides that must agree.

    Attributes:
        scale: largest absolute difference, as a fraction of the output's largest absolute value.
        effect: root mean square of the difference, as a fraction of that of the adapter's effect.
        argmax: smallest fraction of rows of `logits` whose argmax is the same; ties within the
            noise count as the same.
    """

    scale: float
    effect: float = 0.002
    argmax: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("scale", math.inf), ("effect", math.inf), ("argmax", 1.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= most and (value or name == "argmax")):
                expected = "a number from 0 to 1" if name == "argmax" else "a number above 0"
                raise UsageError(f"tolerance {name}", expected=expected, found=repr(value))


DEFAULT_TOLERANCES = {
    "float64": Tolerance(1e-4),
    "float32": Tolerance(1e-4),
    # Half precision rounds every weight (and, in a half-precision graph, every step) by up to
    # 2^-11 or 2^-8; over the depth of a model about twenty such errors add up. Near-ties then
    # turn, so the argmax is reported but not demanded.
    "float16": Tolerance(1e-2, argmax=0.0),
    "bfloat16": Tolerance(8e-2, argmax=0.0),
    # Quantisation to 8 or 4 bits loses much by design: only gross faults show.
    "int8": Tolerance(2.5e-1, argmax=0.0),
}


def resolve_tolerances(given: Mapping[str, Tolerance | float] | None) -> dict[str, Tolerance]:
    """Returns `DEFAULT_TOLERANCES`, replaced where `given`; a bare number sets `scale` alone."""
    tolerances = dict(DEFAULT_TOLERANCES)
    for precision, value in (given or {}).items():
        if precision not in PRECISIONS:
            expected = f"one of {', '.join(PRECISIONS)}"
            raise UsageError(
                f"tolerance for {precision!r}", expected=expected, found=repr(precision)
            )
        if not isinstance(value, Tolerance):
            value = replace(tolerances[precision], scale=float(value))
        tolerances[precision] = value
    return tolerances


def coarser(left: str, right: str) -> str:
    """Returns the coarser of two precisions."""
    return max(left, right, key=PRECISIONS.index)
