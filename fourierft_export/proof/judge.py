"""Which sides must agree, which must differ, and what arithmetic alone may explain.

A float32 merge, a bfloat16 merge and a graph cannot agree to the last digit, and no fixed bound
fits them all: a bfloat16 checkpoint is a thousand times noisier than a float32 graph, and an
adapter's effect may be large or tiny. So sides of one weight precision that compute in float32 are
held to the strict bound (the torch side exists once per precision), and what is put down to
arithmetic is measured where a torch model is at hand: float32 against float64 arithmetic on the
same model, and rounded against unrounded weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from .compare import Array, Outputs, compare_change, compare_outputs, rms_difference
from .report import Comparison, Side
from .tolerances import ASSUMED_NOISE, ASSUMED_NOISE_COARSE, Tolerance, coarser


@dataclass(frozen=True)
class Run:
    """A side together with its outputs.

    Attributes:
        side: what it is.
        outputs: output name -> array.
        computes: precision of its arithmetic; a bfloat16 checkpoint is computed in float32.
        rebuilt: it was rebuilt here from base and bundle; two such sides are not compared.
    """

    side: Side
    outputs: Outputs
    computes: str = "float32"
    rebuilt: bool = False


@dataclass
class Noise:
    """Root mean square of what arithmetic alone changes, per output, as far as it was measured.

    Attributes:
        arithmetic: weight precision -> output -> noise of float32 arithmetic on such weights.
        rounding: weight precision -> output -> change that rounding the weights to it makes.
    """

    arithmetic: dict[str, dict[str, float]] = field(default_factory=dict)
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)

    def between(self, left: Run, right: Run) -> tuple[dict[str, float], float]:
        """The noise to expect between two sides: measured, and assumed where it was not.

        Returns:
            Output name -> root mean square, and the fraction of an output's own root mean square
            for outputs that the mapping lacks.
        """
        coarse = coarser(_coarsest(left), _coarsest(right))
        assumed = ASSUMED_NOISE_COARSE.get(coarse, ASSUMED_NOISE)
        if strictly_alike(left, right):
            return self.arithmetic.get(left.side.precision, {}), assumed
        arithmetic = self.arithmetic.get(coarse, {})
        rounding = self.rounding.get(coarse, {})
        return {
            name: value + arithmetic.get(name, 0.0) for name, value in rounding.items()
        }, assumed


def strictly_alike(left: Run, right: Run) -> bool:
    """Both hold weights of one precision and compute in float32."""
    same = left.side.precision == right.side.precision
    return same and left.computes == right.computes == "float32"


def judge(
    references: Sequence[Run],
    adapted: Sequence[Run],
    *,
    primary: str | None,
    mask: Array | None,
    tolerances: Mapping[str, Tolerance],
    noise: Noise,
) -> tuple[Comparison, ...]:
    """Compare all pairs that say something.

    Args:
        references: sides without the adapter's deltas, which adapted sides of their precision
            must differ from; the last one of the first adapted side's precision measures the
            adapter's effect.
        adapted: sides that must agree with one another; the first is the most trustworthy.
        primary: the output that every side must have; None if every output is.
        mask: see `compare_outputs`.
        tolerances: by precision.
        noise: what was measured.

    Returns:
        First the pairs that must agree, then those that must differ.
    """
    effect: dict[str, float] | None = None
    alike = [r for r in references if adapted and r.side.precision == adapted[0].side.precision]
    if alike or (references and adapted):
        effect = rms_difference((alike or references)[-1].outputs, adapted[0].outputs, mask)
    comparisons = []
    for left, right in combinations(adapted, 2):
        if left.rebuilt and right.rebuilt:
            continue
        # A model rebuilt for one coarse precision is there for sides of that precision only.
        if left.rebuilt and left.side.precision not in ("float32", right.side.precision):
            continue
        precision = coarser(_coarsest(left), _coarsest(right))
        strict = strictly_alike(left, right)
        measured, assumed = noise.between(left, right)
        outputs = compare_outputs(
            left.outputs,
            right.outputs,
            mask=mask,
            tolerance=tolerances["float32" if strict else precision],
            effect=effect,
            noise=measured,
            assumed_noise=assumed,
            names=_shared(left.outputs, right.outputs, primary),
        )
        pair = (left.side.name, right.side.name)
        comparisons.append(Comparison(*pair, "equal", "float32" if strict else precision, outputs))
    for left in references:
        for right in adapted:
            if _has_closer(left, right, references):
                continue
            measured, assumed = noise.between(left, right)
            outputs = compare_change(
                left.outputs,
                right.outputs,
                mask=mask,
                noise=measured,
                assumed_noise=assumed,
                names=_shared(left.outputs, right.outputs, primary),
            )
            precision = coarser(_coarsest(left), _coarsest(right))
            pair = (left.side.name, right.side.name)
            comparisons.append(Comparison(*pair, "different", precision, outputs))
    return tuple(comparisons)


def _has_closer(left: Run, right: Run, references: Sequence[Run]) -> bool:
    """Another reference has the side's precision: rounding is not to pass for an adapter."""
    wanted = right.side.precision
    return left.side.precision != wanted and any(r.side.precision == wanted for r in references)


def _coarsest(run: Run) -> str:
    return coarser(run.side.precision, run.computes)


def _shared(left: Outputs, right: Outputs, primary: str | None) -> list[str]:
    """Names to compare: all of either side, or, with a primary output, it and what both have."""
    if primary is None:
        return list(dict.fromkeys([*left, *right]))
    return list(dict.fromkeys([primary, *(name for name in left if name in right)]))
