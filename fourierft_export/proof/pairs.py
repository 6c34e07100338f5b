"""Decides which sides are compared, and how large a difference rounding explains.

Even faultless artifacts differ a little: float32 sums depend on their order, and a bfloat16 file
rounds every weight. A fixed bound would have to allow the worst of that and would then miss small
faults. So the noise (what rounding alone changes in an output, as a root mean square) is measured
where a torch model is at hand:

- arithmetic noise: the same model in float32 and in float64;
- rounding noise: the model with weights rounded to bfloat16 or float16, and unrounded.

Two sides with weights of one precision that both compute in float32 may differ by the arithmetic
noise; for that the adapted model is rebuilt once per precision. Any other pair may differ by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

from ..types import Array
from .compare import (
    ASSUMED_NOISE,
    Conditions,
    Outputs,
    compare_change,
    compare_outputs,
    rms_difference,
)
from .report import Comparison, Side
from .tolerances import Tolerance, coarser

ASSUMED_NOISE_COARSE = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-6}
"""`ASSUMED_NOISE` of coarser precisions: one rounding error of the weights."""


@dataclass(frozen=True)
class Run:
    """A side together with its outputs."""

    side: Side
    outputs: Outputs
    computes: str = "float32"  # precision of its arithmetic; bfloat16 checkpoints run in float32
    rebuilt: bool = False  # here, from base and bundle; two such sides are not compared

    @property
    def precision(self) -> str:
        """The coarser one of its weights' precision and its arithmetic's."""
        return coarser(self.side.precision, self.computes)


@dataclass
class Noise:
    """The noise that was measured: weight precision -> output name -> root mean square."""

    arithmetic: dict[str, dict[str, float]] = field(default_factory=dict)  # of float32 arithmetic
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)  # of rounding the weights

    def between(self, left: Run, right: Run) -> dict[str, float]:
        """Returns output name -> the noise between two sides, as far as it was measured."""
        if _same_arithmetic(left, right):
            return self.arithmetic.get(left.side.precision, {})
        coarse = coarser(left.precision, right.precision)
        arithmetic, rounding = self.arithmetic.get(coarse, {}), self.rounding.get(coarse, {})
        return {name: value + arithmetic.get(name, 0.0) for name, value in rounding.items()}


def compare_pairs(
    references: Sequence[Run],
    adapted: Sequence[Run],
    *,
    primary: str | None,
    mask: Array | None,
    tolerances: Mapping[str, Tolerance],
    noise: Noise,
    tokens: Array | None = None,
) -> tuple[Comparison, ...]:
    """Compares all pairs that prove something: first those that must agree, then the others.

    Args:
        references: sides without the adapter's weight changes, the closest to the adapted ones
            last. Adapted sides of their precision must differ from them.
        adapted: sides that must agree, the most trustworthy first.
        primary: the output that every side must have; None: all outputs.
        mask: (batch, positions), true where a token is real.
        tolerances: for every precision.
        noise: what was measured.
        tokens: (batch, positions), -1 on padding: what a causal model's logits should predict.
    """

    def conditions(left: Run, right: Run, precision: str) -> Conditions:
        names = [*left.outputs, *right.outputs]
        if primary is not None:
            names = [primary, *(name for name in left.outputs if name in right.outputs)]
        assumed = ASSUMED_NOISE_COARSE.get(precision, ASSUMED_NOISE)
        measured = noise.between(left, right)
        return Conditions(mask, measured, assumed, list(dict.fromkeys(names)), tokens)

    effect: dict[str, float] | None = None
    if references and adapted:
        alike = [r for r in references if r.side.precision == adapted[0].side.precision]
        effect = rms_difference((alike or references)[-1].outputs, adapted[0].outputs, mask)
    comparisons = []
    for left, right in combinations(adapted, 2):
        # A model rebuilt for one coarse precision is there for sides of that precision only.
        own_precision = left.side.precision in ("float32", right.side.precision)
        if left.rebuilt and (right.rebuilt or not own_precision):
            continue
        coarse = coarser(left.precision, right.precision)
        precision = "float32" if _same_arithmetic(left, right) else coarse
        outputs = compare_outputs(
            left.outputs,
            right.outputs,
            conditions(left, right, coarse),
            tolerance=tolerances[precision],
            effect=effect,
        )
        pair = (left.side.name, right.side.name)
        comparisons.append(Comparison(*pair, "equal", precision, outputs))
    for left, right in product(references, adapted):
        # Rounding must not pass for an effect: a reference of the side's own precision goes first.
        wanted = right.side.precision
        if left.side.precision != wanted and any(r.side.precision == wanted for r in references):
            continue
        coarse = coarser(left.precision, right.precision)
        outputs = compare_change(left.outputs, right.outputs, conditions(left, right, coarse))
        pair = (left.side.name, right.side.name)
        comparisons.append(Comparison(*pair, "different", coarse, outputs))
    return tuple(comparisons)


def _same_arithmetic(left: Run, right: Run) -> bool:
    """Whether both hold weights of one precision and compute in float32."""
    same = left.side.precision == right.side.precision
    return same and left.computes == right.computes == "float32"
