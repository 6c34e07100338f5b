"""Compares two sets of outputs, output by output, in float64 whatever their dtype.

`align` makes two arrays comparable, `measure` computes the figures, and two judges use them:
`compare_outputs` for sides that must agree, `compare_change` for sides that must differ. Both know
the noise: the root mean square that rounding alone explains in an output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..types import Array
from .report import Difference, OutputComparison
from .tolerances import DEFAULT_TOLERANCES, Tolerance

Outputs = Mapping[str, Array]
"""Output name -> array."""

ARGMAX_OUTPUTS = frozenset({"logits"})
"""Outputs whose argmax is a decision, so that it must be the same."""

NEGLIGIBLE = 1e-3
"""Values below this fraction of the scale do not count for the relative difference."""

NOISE_MARGIN = 8.0
"""How many times the measured noise still passes for rounding: two implementations sum in
different orders, and their errors were seen up to three times apart."""

ASSUMED_NOISE = 2.0**-18
"""Noise, as a fraction of an output's root mean square, where no torch model was given to measure
it on: 64 float32 rounding errors."""


class Rows(NamedTuple):
    """The values of one output that count, on both sides, as (rows, last axis)."""

    left: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    indices: npt.NDArray[np.int64]  # (rows, leading axes): the place of each row in the output


@dataclass(frozen=True)
class Conditions:
    """What both judges know of a pair of sides."""

    # (batch, positions), true where a token is real. Outputs of shape (batch, positions, ...) are
    # compared there only: what a model computes on padding does not matter.
    mask: Array | None = None
    noise: Mapping[str, float] = field(default_factory=dict)  # output -> what rounding changes
    assumed_noise: float = ASSUMED_NOISE  # of other outputs, as a fraction of their size
    names: Collection[str] | None = None  # the outputs to compare; default all of the left side
    # (batch, positions), -1 on padding: what a causal model's logits should predict.
    tokens: Array | None = None


def compare_outputs(
    reference: Outputs,
    other: Outputs,
    conditions: Conditions = Conditions(),
    *,
    tolerance: Tolerance = DEFAULT_TOLERANCES["float32"],
    effect: Mapping[str, float] | None = None,
) -> tuple[OutputComparison, ...]:
    """Compares two sides that must agree; an output that one of them lacks is a failure.

    Args:
        reference, other: output name -> array of any shape and real dtype.
        conditions: mask and noise.
        tolerance: what is allowed.
        effect: output name -> root mean square of what the adapter changes; without it only the
            output's own scale bounds the difference.
    """

    def judge(name: str, rows: Rows, floor: float) -> OutputComparison:
        found = measure(name, rows, tie=2 * NOISE_MARGIN * floor, tokens=conditions.tokens)
        allowed_abs = tolerance.scale * found.scale
        change = (effect or {}).get(name)
        allowed_rms = None if change is None else tolerance.effect * change + NOISE_MARGIN * floor
        place = f"{name}{list(found.index)} is {found.left:.6g} against {found.right:.6g}"
        same = found.argmax if name in ARGMAX_OUTPUTS else None
        reason = ""
        if found.max_abs > allowed_abs:
            reason = (
                f"{place}; they differ by {found.max_abs:.3g}, above {tolerance.scale:g} of the "
                f"output's scale {found.scale:.3g}"
            )
        elif change is not None and allowed_rms is not None and found.rms > allowed_rms:
            share = f"{found.rms / change:.2%}" if change else "more than all"
            reason = (
                f"{place}; their root mean square difference {found.rms:.3g} is {share} of what "
                f"the adapter changes ({change:.3g}), above the allowed {allowed_rms:.3g}"
            )
        elif same is not None and same < tolerance.argmax:
            reason = f"argmax the same in only {same:.2%} of the rows of {name}"
        resolution = allowed_rms / change if allowed_rms is not None and change else None
        verdict = not reason, reason, found
        return OutputComparison(name, *verdict, allowed_abs, allowed_rms, resolution)

    return _judge_each(reference, other, conditions, judge)


def compare_change(
    base: Outputs,
    adapted: Outputs,
    conditions: Conditions = Conditions(),
) -> tuple[OutputComparison, ...]:
    """Compares two sides of which the adapter must have changed one.

    An output has changed when the root mean square of its difference is above `NOISE_MARGIN` times
    the noise, or when its shape has: a head with more labels.
    """

    def judge(name: str, rows: Rows, floor: float) -> OutputComparison:
        found, needed = measure(name, rows, tokens=conditions.tokens), NOISE_MARGIN * floor
        reason = (
            f"the adapter changes nothing in {name}: root mean square {found.rms:.3g}, where "
            f"rounding alone explains {needed:.3g}"
        )
        changed = found.rms > needed
        return OutputComparison(name, changed, "" if changed else reason, found, None, needed)

    if conditions.names is None:
        conditions = replace(conditions, names=[name for name in base if name in adapted])
    return _judge_each(base, adapted, conditions, judge, may_reshape=True)


def _judge_each(
    left: Outputs,
    right: Outputs,
    conditions: Conditions,
    judge: Callable[[str, Rows, float], OutputComparison],
    *,
    may_reshape: bool = False,
) -> tuple[OutputComparison, ...]:
    """Calls `judge` with the rows and the noise of each output that can be compared."""
    results = []
    for name in list(left) if conditions.names is None else conditions.names:
        rows = align(name, left, right, conditions.mask)
        if isinstance(rows, str):
            both = name in left and name in right
            reshaped = may_reshape and both and left[name].shape != right[name].shape
            results.append(OutputComparison(name, reshaped, "" if reshaped else rows, None))
        else:
            floor = conditions.noise.get(name, conditions.assumed_noise * _rms(rows.left))
            results.append(judge(name, rows, floor))
    nothing = OutputComparison("(none)", False, "there is no output to compare", None)
    return tuple(results) or (nothing,)


def rms_difference(left: Outputs, right: Outputs, mask: Array | None = None) -> dict[str, float]:
    """Measures the root mean square difference of the outputs that can be compared."""
    pairs = {name: align(name, left, right, mask) for name in left}
    return {n: _rms(rows.left - rows.right) for n, rows in pairs.items() if isinstance(rows, Rows)}


def align(name: str, left: Outputs, right: Outputs, mask: Array | None) -> Rows | str:
    """Selects the values of an output to compare, or says why they cannot be compared."""
    for side, which in ((left, "left"), (right, "right")):
        if name not in side:
            have = ", ".join(side) or "none"
            return f"the {which} side has no output {name} (it has: {have})"
    a, b = left[name], right[name]
    if a.shape != b.shape:
        return f"shape {a.shape} against {b.shape}"
    if a.size == 0:
        return f"{name} is empty: shape {a.shape}"
    lead = a.shape[:-1]
    keep = np.ones(lead, dtype=bool)
    if mask is not None and a.ndim >= 3 and lead[:2] == mask.shape:
        keep &= mask.astype(bool).reshape(mask.shape + (1,) * (len(lead) - 2))
    indices = np.argwhere(keep)
    if not len(indices):
        return f"the mask leaves nothing of {name} to compare"
    rows = [np.asarray(x, dtype=np.float64)[keep].reshape(len(indices), -1) for x in (a, b)]
    for array, which in zip(rows, ("left", "right"), strict=True):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            place = [*indices[bad[0][0]].tolist(), *([int(bad[0][1])] if a.ndim else [])]
            value = array[tuple(bad[0])]
            return f"{name}{place} of the {which} side is {value}: not a finite number"
    return Rows(rows[0], rows[1], indices)


def measure(name: str, rows: Rows, *, tie: float = 0.0, tokens: Array | None = None) -> Difference:
    """Computes the figures; a right argmax that is behind by at most `tie` counts as the same."""
    left, right, indices = rows
    gap = np.abs(left - right)
    row, column = np.unravel_index(int(np.argmax(gap)), gap.shape)
    magnitude = np.abs(left)
    scale = float(magnitude.max())
    counts = magnitude >= NEGLIGIBLE * scale if scale else np.zeros_like(gap, dtype=bool)
    lengths = float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    both_zero = not left.any() and not right.any()
    behind = left.max(axis=1) - left[np.arange(len(left)), right.argmax(axis=1)]
    same = float((behind <= tie).mean()) if left.shape[1] > 1 else None
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    angles = np.einsum("ij,ij->i", left, right)[norms > 0] / norms[norms > 0]
    logits = name in ARGMAX_OUTPUTS and left.shape[1] > 1
    kl, perplexity = _compare_softmax(rows, tokens) if logits else (None, None)
    return Difference(
        count=gap.size,
        scale=scale,
        max_abs=float(gap.max()),
        max_rel=float((gap[counts] / magnitude[counts]).max()) if counts.any() else 0.0,
        mean_abs=float(gap.mean()),
        rms=_rms(left - right),
        cosine=float(np.vdot(left, right)) / lengths if lengths else float(both_zero),
        argmax=same,
        index=(*indices[row].tolist(), int(column)),
        left=float(left[row, column]),
        right=float(right[row, column]),
        agreement=None if same is None else wilson_interval(same, len(left)),
        row_cosine=float(angles.mean()) if len(angles) else float(both_zero),
        kl=kl,
        perplexity=perplexity,
    )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a share of `count` trials, after Wilson (1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _compare_softmax(rows: Rows, tokens: Array | None) -> tuple[float, tuple[float, float] | None]:
    """Computes the mean KL divergence, and both perplexities if `tokens` are predicted."""
    divergence, losses, predicted = 0.0, np.zeros(2), 0
    for start in range(0, len(rows.left), 256):
        part = slice(start, start + 256)
        left, right = (_log_softmax(side[part]) for side in rows[:2])
        divergence += float((np.exp(left) * (left - right)).sum())
        where = rows.indices[part]
        if tokens is None or where.shape[1] != 2 or where[:, 1].max() >= tokens.shape[1]:
            continue
        following = np.pad(tokens, ((0, 0), (0, 1)), constant_values=-1)[
            where[:, 0], where[:, 1] + 1
        ]
        real = np.flatnonzero(following >= 0)
        losses -= [side[real, following[real]].sum() for side in (left, right)]
        predicted += len(real)
    both = np.exp(losses / max(predicted, 1))
    return divergence / len(rows.left), (float(both[0]), float(both[1])) if predicted else None


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _rms(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
