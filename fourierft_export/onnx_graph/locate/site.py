"""Records of the layers to find in a graph, and of where they are.

Fingerprints of base weights are compared with constants here, also with parts of packed ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ...bundle.fingerprint import SAMPLE_ATOL, SAMPLE_RTOL, compare_weight, sample_positions
from ...bundle.spec import Fingerprint
from ...types import Array
from ..graph.source import Source, constant_of, constant_shape
from .quantised import QuantisedLinear
from .weight_uses import Use

if TYPE_CHECKING:
    import onnx_ir as ir

_MAX_PARTS = 64


@dataclass(frozen=True)
class Wanted:
    """A layer to find: its module path in the adapter, and what is known of its base weight.

    Attributes:
        shape: (out, in).
        transposed: the base stores its weight as (in, out).
        fingerprint: of the base weight as stored.
    """

    name: str
    shape: tuple[int, int] | None = None
    transposed: bool = False
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """A constant, or a part of it, that is a layer's weight.

    Attributes:
        layer: module path, as the adapter names it.
        value: the constant that holds the weight, or a quantised weight's integers.
        shape: (out, in) of the layer.
        transposed: the constant holds the weight as (in, out).
        uses: the consumers that are this layer.
        start: the layer's first output, where its weight is a part of a packed one; else None.
        shared: other consumers use the constant, too, and keep the base's weight.
        quantised: the quantised linear layer that this is; None for a float weight.
        verdict: of the fingerprint: "same", "precision", "different", or None without one.
    """

    layer: str
    value: ir.Value
    shape: tuple[int, int]
    transposed: bool
    uses: tuple[Use, ...] = ()
    start: int | None = None
    shared: bool = False
    quantised: QuantisedLinear | None = None
    verdict: str | None = None

    @property
    def name(self) -> str:
        """The constant's name."""
        return str(self.value.name)

    @property
    def rows(self) -> slice:
        """The layer's outputs among those of the constant."""
        return slice(self.start or 0, (self.start or 0) + self.shape[0])

    @property
    def outputs(self) -> int:
        """Number of outputs of the whole constant, of which the layer's are a part."""
        if self.quantised is not None:
            return self.quantised.shape[0]
        shape = constant_shape(self.value)
        return shape[1 if self.transposed else 0] if shape else 0

    @property
    def consumers(self) -> tuple[tuple[ir.Node, int], ...]:
        """The nodes that take the constant as this layer's weight: (node, index of its input)."""
        return tuple(dict.fromkeys((use.node, use.index) for use in self.uses))

    @property
    def products(self) -> list[tuple[tuple[ir.Node, int], ir.Value, float]]:
        """Per use where x comes in, the y of the whole constant, and the weight's factor in y."""
        if self.quantised is not None:
            return [(self.quantised.fed, self.quantised.y, 1.0)]
        return [((use.linear, 0), use.linear.outputs[0], use.factor or 1.0) for use in self.uses]

    def describe(self) -> str:
        """The site for a list that a person chooses from."""
        if self.quantised is not None:
            part = "" if self.start is None else f"[{self.rows.start}:{self.rows.stop}]"
            return f"{self.name}{part} {list(self.shape)} ({self.quantised.kind})"
        scopes = sorted({use.path for use in self.uses if use.path})
        where = f" at {scopes[0]}" if scopes else ""
        return f"{self.name} {list(constant_shape(self.value))}{where}"


def compare_site(source: Source, site: Site, want: Wanted) -> str | None:
    """Whether a site holds the weight that was fingerprinted: "same", "precision" or "different".

    None if it cannot be known: no fingerprint, or a quantised form that is not understood.
    """
    tensor = constant_of(site.value)
    if want.fingerprint is None or tensor is None:
        return None
    if site.quantised is not None:
        held = _read(source, site)
        if held is None:
            return None
        own = replace(want, shape=want.shape or site.shape)
        fits = own.shape == site.shape and _samples_fit(held, False, site.rows.start, own)
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
    held = _read(source, one) if wanted else None
    if held is None:
        return
    for want in wanted:
        for transposed in (False,) if one.quantised else (False, True):
            outputs, inputs = reversed(one.shape) if transposed else one.shape
            if want.shape is None or inputs != want.shape[1]:
                continue
            for start in _possible_starts(outputs, want.shape[0], sizes):
                if _samples_fit(held, transposed, start, want):
                    yield want, transposed, (start, start + want.shape[0])


def _possible_starts(total: int, size: int, sizes: Sequence[int]) -> list[int]:
    """Where a part of `size` outputs may begin in a packed weight of `total`."""
    if total == size:
        return [0]
    found = {0, *range(0, min(total, size * _MAX_PARTS), size), total - size, total - 2 * size}
    found |= {first + second for first in set(sizes) for second in {0, *sizes}}
    return sorted(start for start in found if 0 <= start <= total - size)


def _read(source: Source, site: Site) -> tuple[Array, Array | None] | None:
    """A whole constant, and of a quantised one the steps; None if its form is not understood."""
    if site.quantised is None:
        return source.read_constant(site.value), None
    return None if site.quantised.dequantised is None else site.quantised.dequantised()


def _samples_fit(
    held: tuple[Array, Array | None], transposed: bool, start: int, want: Wanted
) -> bool:
    """Whether the layer's values from output `start` of a constant on are those sampled."""
    if want.fingerprint is None or want.shape is None:
        return False
    outputs, inputs = want.shape
    stored = (inputs, outputs) if want.transposed else (outputs, inputs)
    first, second = np.unravel_index(sample_positions(outputs * inputs), stored)
    out, into = (second, first) if want.transposed else (first, second)
    place = (into, out + start) if transposed else (out + start, into)
    got, step = held[0][place], None if held[1] is None else held[1][place]
    exact = np.frombuffer(want.fingerprint.samples, "<u2").view(ml_dtypes.bfloat16)
    expected = exact.astype(np.float64)
    if step is None:
        with np.errstate(over="ignore"):
            rounded = got.astype(ml_dtypes.bfloat16).astype(np.float64)
        return bool(np.allclose(expected, rounded, rtol=SAMPLE_RTOL, atol=SAMPLE_ATOL))
    # The largest value of a block may be clipped by up to a step.
    tolerance = step * 1.01 + SAMPLE_RTOL * np.abs(expected)
    return bool((np.abs(got - expected) <= tolerance).all())
