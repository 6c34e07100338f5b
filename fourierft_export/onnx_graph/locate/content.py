"""Compares constants with fingerprints, in both orientations and within packed weights.

Eight sampled values rule out most constants. A float weight is confirmed by its hash (in another
precision by the samples), a quantised one by the samples, within a quantisation step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np

from ...bundle.fingerprint import SAMPLE_ATOL, SAMPLE_RTOL, compare_weight, sample_positions
from ...types import Array
from ..graph.source import Source, constant_of
from .site import Site, Wanted

# From int64 outputs (k,) and inputs (k,) of a layer's weight to its values, and to their
# quantisation steps; None for a float weight.
Sampler = Callable[[Array, Array, bool], "tuple[Array, Array | None]"]

_MAX_PARTS = 64


def compare_site(source: Source, site: Site, want: Wanted) -> str | None:
    """Whether a site holds the weight that was fingerprinted: "same", "precision" or "different".

    None if it cannot be known: no fingerprint, or a quantised form that is not understood.
    """
    tensor = constant_of(site.value)
    if want.fingerprint is None or tensor is None:
        return None
    if site.quantised is not None:
        sample = _sampler(source, site)
        if sample is None:
            return None
        fits = want.shape in (None, site.shape) and _samples_fit(
            sample, False, site.rows.start, site.shape, want
        )
        return "precision" if fits else "different"
    weight = part_of(source.read(tensor), site.transposed, site.start, site.shape[0])
    return compare_weight(
        want.fingerprint, weight if site.transposed == want.transposed else weight.T
    )


def part_of(weight: Array, transposed: bool, start: int | None, outputs: int) -> Array:
    """The layer's outputs of a packed weight, as a view; the whole weight if `start` is None."""
    if start is None:
        return weight
    where = slice(start, start + outputs)
    return weight[:, where] if transposed else weight[where]


def match_constant(
    source: Source, one: Site, wanted: Sequence[Wanted], sizes: Sequence[int]
) -> Iterator[tuple[Wanted, bool, tuple[int, int]]]:
    """Find the layers whose sampled values a constant holds; it is read or dequantised once.

    Args:
        one: the constant, its shape as the graph holds it.
        wanted: with shapes and fingerprints.
        sizes: numbers of outputs of the adapter's layers, of which packed weights are made.

    Yields:
        The layer, whether the constant holds it as (in, out), and its outputs (first, last + 1).
    """
    sample = _sampler(source, one) if wanted else None
    if sample is None:
        return
    for want in wanted:
        for transposed in (False,) if one.quantised else (False, True):
            outputs, inputs = reversed(one.shape) if transposed else one.shape
            if want.shape is None or inputs != want.shape[1]:
                continue
            for start in _possible_starts(outputs, want.shape[0], sizes):
                if _samples_fit(sample, transposed, start, want.shape, want):
                    yield want, transposed, (start, start + want.shape[0])


def _possible_starts(total: int, size: int, sizes: Sequence[int]) -> list[int]:
    """Where a part of `size` outputs may begin in a packed weight of `total`."""
    if total == size:
        return [0]
    found = {0, *range(0, min(total, size * _MAX_PARTS), size), total - size, total - 2 * size}
    found |= {first + second for first in set(sizes) for second in {0, *sizes}}
    return sorted(start for start in found if 0 <= start <= total - size)


def _sampler(source: Source, site: Site) -> Sampler | None:
    """A function that gives single values of a whole constant, read or dequantised once."""
    tensor = constant_of(site.value)
    if site.quantised is not None:
        if site.quantised.dequantised is None:
            return None
        weight, step = site.quantised.dequantised()
        return lambda out, into, _: (weight[out, into], step[out, into])
    if tensor is None:
        return None
    held = source.read(tensor)
    return lambda out, into, transposed: ((held.T if transposed else held)[out, into], None)


def _samples_fit(
    sample: Sampler, transposed: bool, start: int, shape: tuple[int, int], want: Wanted
) -> bool:
    """Whether the values of the weight of this shape from output `start` on are those sampled."""
    if want.fingerprint is None:
        return False
    outputs, inputs = shape
    stored = (inputs, outputs) if want.transposed else (outputs, inputs)
    first, second = np.unravel_index(sample_positions(outputs * inputs), stored)
    out, into = (second, first) if want.transposed else (first, second)
    got, step = sample(out + start, into, transposed)
    exact = np.frombuffer(want.fingerprint.samples, "<u2").view(ml_dtypes.bfloat16)
    expected = exact.astype(np.float64)
    if step is None:
        with np.errstate(over="ignore"):
            rounded = got.astype(ml_dtypes.bfloat16).astype(np.float64)
        return bool(np.allclose(expected, rounded, rtol=SAMPLE_RTOL, atol=SAMPLE_ATOL))
    # The largest value of a block may be clipped by up to a step.
    tolerance = step * 1.01 + SAMPLE_RTOL * np.abs(expected)
    return bool((np.abs(got - expected) <= tolerance).all())
