"""Compares two sets of outputs, output by output, in float64 whatever their dtype."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt

from ..types import Array
from .report import Difference, OutputComparison
from .tolerances import ASSUMED_NOISE, DEFAULT_TOLERANCES, NOISE_MARGIN, Tolerance

Outputs = Mapping[str, Array]
"""Output name -> array."""
Rows = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

ARGMAX_OUTPUTS = frozenset({"logits"})
"""Outputs whose argmax is a decision, so that it must be the same."""

NEGLIGIBLE = 1e-3
"""Values below this fraction of the scale do not count for the relative difference."""


def compare_outputs(
    reference: Outputs,
    other: Outputs,
    *,
    mask: Array | None = None,
    tolerance: Tolerance | None = None,
    effect: Mapping[str, float] | None = None,
    noise: Mapping[str, float] | None = None,
    assumed_noise: float = ASSUMED_NOISE,
    names: Collection[str] | None = None,
) -> tuple[OutputComparison, ...]:
    """Compares two sides that must agree.

    Args:
        reference: output name -> array of any shape and real dtype.
        other: the same from the other side.
        mask: (batch, positions), true where a token is real. Outputs of shape (batch, positions,
            ...) are compared there only: what a model computes on padding does not matter.
        tolerance: what is allowed; default that of float32.
        effect: output name -> root mean square of what the adapter changes; without it only the
            output's own scale bounds the difference.
        noise: output name -> root mean square of what rounding alone changes.
        assumed_noise: the same for other outputs, as a fraction of their root mean square.
        names: the outputs to compare; default all of the reference's.

    Returns:
        One entry per name; an output that a side lacks is a failure.
    """
    allowed = tolerance or DEFAULT_TOLERANCES["float32"]

    def check(name: str, rows: tuple[Rows, Rows, Indices], floor: float) -> OutputComparison:
        found = _difference(*rows, tie=2 * NOISE_MARGIN * floor)
        allowed_abs = allowed.scale * found.scale
        change = (effect or {}).get(name)
        allowed_rms = None if change is None else allowed.effect * change + NOISE_MARGIN * floor
        place = f"{name}{list(found.index)} is {found.left:.6g} against {found.right:.6g}"
        same = found.argmax if name in ARGMAX_OUTPUTS else None
        reason = ""
        if found.max_abs > allowed_abs:
            reason = (
                f"{place}; they differ by {found.max_abs:.3g}, above {allowed.scale:g} of the "
                f"output's scale {found.scale:.3g}"
            )
        elif change is not None and allowed_rms is not None and found.rms > allowed_rms:
            share = f"{found.rms / change:.2%}" if change else "more than all"
            reason = (
                f"{place}; their root mean square difference {found.rms:.3g} is {share} of what "
                f"the adapter changes ({change:.3g}), above the allowed {allowed_rms:.3g}"
            )
        elif same is not None and same < allowed.argmax:
            reason = f"argmax the same in only {same:.2%} of the rows of {name}"
        resolution = allowed_rms / change if allowed_rms is not None and change else None
        return OutputComparison(
            name, not reason, reason, found, allowed_abs, allowed_rms, resolution
        )

    wanted = list(reference) if names is None else names
    return _check_each(wanted, reference, other, mask, noise, assumed_noise, check)


def compare_change(
    base: Outputs,
    adapted: Outputs,
    *,
    mask: Array | None = None,
    noise: Mapping[str, float] | None = None,
    assumed_noise: float = ASSUMED_NOISE,
    names: Collection[str] | None = None,
) -> tuple[OutputComparison, ...]:
    """Compares two sides of which the adapter must have changed one. Arguments as above.

    An output counts as changed when the root mean square of the difference is above
    `NOISE_MARGIN` times the noise.
    """

    def check(name: str, rows: tuple[Rows, Rows, Indices], floor: float) -> OutputComparison:
        found, needed = _difference(*rows, tie=0.0), NOISE_MARGIN * floor
        reason = (
            f"the adapter changes nothing in {name}: root mean square {found.rms:.3g}, where "
            f"rounding alone explains {needed:.3g}"
        )
        changed = found.rms > needed
        return OutputComparison(name, changed, "" if changed else reason, found, None, needed)

    wanted = [name for name in base if name in adapted] if names is None else names
    return _check_each(wanted, base, adapted, mask, noise, assumed_noise, check, may_reshape=True)


def _check_each(
    names: Collection[str],
    left: Outputs,
    right: Outputs,
    mask: Array | None,
    noise: Mapping[str, float] | None,
    assumed_noise: float,
    check: Callable[[str, tuple[Rows, Rows, Indices], float], OutputComparison],
    *,
    may_reshape: bool = False,
) -> tuple[OutputComparison, ...]:
    """Calls `check` with the rows and the noise of each output that can be compared."""
    results = []
    for name in names:
        rows = _aligned(name, left, right, mask, may_reshape=may_reshape)
        if not isinstance(rows, OutputComparison):
            rows = check(name, rows, (noise or {}).get(name, assumed_noise * _rms(rows[0])))
        results.append(rows)
    return tuple(results) or (_failure("(none)", "there is no output to compare"),)


def rms_difference(left: Outputs, right: Outputs, mask: Array | None = None) -> dict[str, float]:
    """Root mean square difference of every output that both sides have in one shape.

    Args and masking as in `compare_outputs`. An output that is not finite somewhere is left out:
    no bound can be made of it.
    """
    measured = {}
    for name in left:
        pair = _aligned(name, left, right, mask)
        if not isinstance(pair, OutputComparison):
            measured[name] = _rms(pair[0] - pair[1])
    return measured


def _aligned(
    name: str, left: Outputs, right: Outputs, mask: Array | None, *, may_reshape: bool = False
) -> tuple[Rows, Rows, Indices] | OutputComparison:
    """Both arrays as (rows, last axis) in float64 with the index of each row, or a failure."""
    for side, which in ((left, "left"), (right, "right")):
        if name not in side:
            have = ", ".join(side) or "none"
            return _failure(name, f"the {which} side has no output {name} (it has: {have})")
    a, b = left[name], right[name]
    if a.shape != b.shape:
        text = f"shape {a.shape} against {b.shape}"
        # Another shape is a change too: a head with more labels.
        return _failure(name, "" if may_reshape else text, ok=may_reshape)
    if a.size == 0:
        return _failure(name, f"{name} is empty: shape {a.shape}")
    lead = a.shape[:-1]
    keep = np.ones(lead, dtype=bool)
    if mask is not None and a.ndim >= 3 and lead[:2] == mask.shape:
        keep &= mask.astype(bool).reshape(mask.shape + (1,) * (len(lead) - 2))
    indices = np.argwhere(keep)
    if not len(indices):
        return _failure(name, f"the mask leaves nothing of {name} to compare")
    rows = [np.asarray(x, dtype=np.float64)[keep].reshape(len(indices), -1) for x in (a, b)]
    for array, which in zip(rows, ("left", "right"), strict=True):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            place = (*indices[bad[0][0]].tolist(), *([int(bad[0][1])] if a.ndim else []))
            value = array[tuple(bad[0])]
            return _failure(
                name, f"{name}{list(place)} of the {which} side is {value}: not a finite number"
            )
    return rows[0], rows[1], indices


def _failure(name: str, reason: str, *, ok: bool = False) -> OutputComparison:
    return OutputComparison(name, ok, reason, None)


def _difference(left: Rows, right: Rows, indices: Indices, *, tie: float) -> Difference:
    """The figures; `left` and `right` are (rows, last axis), `indices` (rows, leading axes).

    The right side's argmax counts as the same if on the left it is behind by at most `tie`.
    """
    gap = np.abs(left - right)
    row, column = np.unravel_index(int(np.argmax(gap)), gap.shape)
    magnitude = np.abs(left)
    scale = float(magnitude.max())
    counts = magnitude >= NEGLIGIBLE * scale if scale else np.zeros_like(gap, dtype=bool)
    lengths = float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    both_zero = not left.any() and not right.any()
    behind = left.max(axis=1) - left[np.arange(len(left)), right.argmax(axis=1)]
    return Difference(
        count=gap.size,
        scale=scale,
        max_abs=float(gap.max()),
        max_rel=float((gap[counts] / magnitude[counts]).max()) if counts.any() else 0.0,
        mean_abs=float(gap.mean()),
        rms=_rms(left - right),
        cosine=float(np.vdot(left, right)) / lengths if lengths else float(both_zero),
        argmax=float((behind <= tie).mean()) if left.shape[1] > 1 else None,
        index=(*indices[row].tolist(), int(column)),
        left=float(left[row, column]),
        right=float(right[row, column]),
    )


def _rms(array: npt.NDArray[np.generic]) -> float:
    values = np.asarray(array, dtype=np.float64)
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
