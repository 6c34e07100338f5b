"""Is this constant that weight? By the fingerprint, in both orientations and within packed weights.

Eight sampled values say no at once; the hash (or, in another precision, the samples) says yes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from ...bundle.fingerprint import SAMPLE_ATOL, SAMPLE_RTOL, compare, sample_positions
from ...bundle.spec import Fingerprint
from ...types import Array
from ..graph.source import Source, constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

Pick = Callable[[Array, Array], Array]

_MAX_PARTS = 64


class Wish(Protocol):
    """What is known of a layer (`found.Wanted`)."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in), if known."""

    @property
    def transposed(self) -> bool:
        """The base stores its weight as (in, out)."""

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the base weight as stored, if known."""


class Match(NamedTuple):
    """How a constant holds a weight: as (in, out) or not, and from which output on (packed)."""

    transposed: bool
    start: int | None


def matches(
    source: Source, value: ir.Value, shape: tuple[int, int], want: Wish, sizes: Sequence[int]
) -> Iterator[Match]:
    """Every way in which this constant holds the weight.

    Args:
        source: the open file.
        value: the constant.
        shape: of the constant.
        want: a layer with shape and fingerprint.
        sizes: numbers of outputs of the adapter's layers, of which packed weights are made.
    """
    tensor = constant_of(value)
    if want.shape is None or want.fingerprint is None or tensor is None:
        return
    pick: Pick | None = None
    for transposed in (False, True):
        outputs, inputs = reversed(shape) if transposed else shape
        if inputs != want.shape[1] or outputs < want.shape[0]:
            continue
        for start in starts(outputs, want.shape[0], sizes):
            pick = pick or source.picker(tensor)
            if _samples_fit(pick, transposed, start, want):
                part = None if outputs == want.shape[0] else start
                if verdict(source, tensor, transposed, part, want.shape, want) != "different":
                    yield Match(transposed, part)


def verdict(
    source: Source,
    tensor: ir.TensorProtocol | None,
    transposed: bool,
    start: int | None,
    shape: tuple[int, int],
    want: Wish,
) -> str | None:
    """What the fingerprint says of a constant, or of a part of it; None without a fingerprint."""
    if want.fingerprint is None or tensor is None:
        return None
    weight = part_of(source.read(tensor), transposed, start, shape[0])
    return compare(want.fingerprint, weight if transposed == want.transposed else weight.T)


def part_of(weight: Array, transposed: bool, start: int | None, outputs: int) -> Array:
    """A layer's part of a packed weight, as a view; all of one that is not packed."""
    if start is None:
        return weight
    where = slice(start, start + outputs)
    return weight[:, where] if transposed else weight[where]


def starts(total: int, size: int, sizes: Sequence[int]) -> list[int]:
    """Where a part of `size` outputs may begin in a packed weight of `total`."""
    if total == size:
        return [0]
    found = {0, *range(0, min(total, size * _MAX_PARTS), size), total - size, total - 2 * size}
    found |= {first + second for first in sizes for second in (0, *sizes)}
    return sorted(start for start in found if 0 <= start <= total - size)


def _samples_fit(pick: Pick, transposed: bool, start: int, want: Wish) -> bool:
    if want.shape is None or want.fingerprint is None:
        return False
    outputs, inputs = want.shape
    stored = (inputs, outputs) if want.transposed else (outputs, inputs)
    first, second = np.unravel_index(sample_positions(outputs * inputs), stored)
    out, into = (second, first) if want.transposed else (first, second)
    out = out + start
    got = pick(*((into, out) if transposed else (out, into)))
    expected = np.frombuffer(want.fingerprint.samples, "<u2").view(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):
        rounded = got.astype(ml_dtypes.bfloat16).astype(np.float64)
    return np.allclose(expected.astype(np.float64), rounded, rtol=SAMPLE_RTOL, atol=SAMPLE_ATOL)
