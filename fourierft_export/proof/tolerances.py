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
from dataclasses import dataclass

from ..errors import UsageError

PRECISIONS = ("float64", "float32", "float16", "bfloat16", "int8")
"""From fine to coarse; "int8" stands for every quantised form."""

NOISE_MARGIN = 8.0
"""How many times the measured noise still passes for rounding: two implementations sum in
different orders, and their errors were seen up to three times apart."""

ASSUMED_NOISE = 2.0**-18
"""Noise (root mean square, as a fraction of the output's) where it cannot be measured because no
torch model was given: 64 float32 rounding errors."""

ASSUMED_NOISE_COARSE = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-6}
"""The same for coarser precisions: one rounding error of the weights."""


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
        for name, value in (("scale", self.scale), ("effect", self.effect)):
            if not (math.isfinite(value) and value > 0):
                raise UsageError(
                    f"tolerance {name}", expected="a number above 0", found=repr(value)
                )
        if not 0 <= self.argmax <= 1:
            raise UsageError(
                "tolerance argmax", expected="a number from 0 to 1", found=repr(self.argmax)
            )


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
    """Returns `DEFAULT_TOLERANCES`, replaced where `given`; a bare number sets `scale` alone.

    Raises:
        UsageError: an unknown precision, or a value out of range.
    """
    tolerances = dict(DEFAULT_TOLERANCES)
    for precision, value in (given or {}).items():
        if precision not in PRECISIONS:
            raise UsageError(
                f"tolerance for {precision!r}",
                expected=f"one of {', '.join(PRECISIONS)}",
                found=repr(precision),
            )
        if not isinstance(value, Tolerance):
            default = tolerances[precision]
            value = Tolerance(float(value), default.effect, default.argmax)
        tolerances[precision] = value
    return tolerances


def coarser(left: str, right: str) -> str:
    """The coarser of two precisions."""
    return max(left, right, key=PRECISIONS.index)
