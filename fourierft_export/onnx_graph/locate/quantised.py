"""Linear layers with quantised weights, of whatever form (`quantised_forms`).

Their weights stay as they are. What an adapter needs of them is where x comes in and y goes out in
float, and whether they are the layers it was trained on: dequantised samples against the bundle's
fingerprint, within a quantisation step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ...bundle.fingerprint import SAMPLE_RTOL, sample_positions
from ...types import Array
from .found import Wanted

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class QuantisedLinear:
    """A linear layer with a quantised weight.

    Attributes:
        weight: name of the constant that holds its integers.
        kind: "MatMulNBits", "QDQ" or "MatMulInteger".
        shape: (out, in).
        fed: where its input x (..., in) comes in, in float: (node, index of the input).
        y: its output (..., out), float, without bias (a Gemm's: with it).
        node: the MatMulNBits, MatMul, Gemm or MatMulInteger.
        paths: module paths that the graph tells of it.
        dequantised: gives W (out, in) float32 and the quantisation step of each element; None for
            a form that is not understood.
        integers, scale, zero: where the constants come in: (node, index of the input).
        in_out: the integers are (in, out).
        axis: of the integers, along which there is one scale each, if there are several.
        block_size: of MatMulNBits, and of QDQ with one scale per block along the axis; else 0.
        bits: of MatMulNBits.
    """

    weight: str
    kind: str
    shape: tuple[int, int]
    fed: tuple[ir.Node, int]
    y: ir.Value
    node: ir.Node
    paths: tuple[str, ...]
    dequantised: Callable[[], tuple[Array, Array]] | None
    integers: tuple[ir.Node, int]
    scale: tuple[ir.Node, int] | None = None
    zero: tuple[ir.Node, int] | None = None
    in_out: bool = False
    axis: int = 1
    block_size: int = 0
    bits: int = 8


@dataclass(frozen=True, eq=False)
class QuantisedSite:
    """A layer of a quantised linear node: all of its outputs, or some where several are packed.

    Attributes:
        linear: the node.
        start: the layer's first output, for packed ones; else None.
        shape: (out, in) of the layer.
    """

    linear: QuantisedLinear
    start: int | None
    shape: tuple[int, int]

    @property
    def rows(self) -> slice:
        """The layer's outputs."""
        return slice(self.start or 0, (self.start or 0) + self.shape[0])

    def verdict(self, want: Wanted, content: tuple[Array, Array] | None = None) -> str | None:
        """What the fingerprint says: "precision", "different", or None without one.

        Args:
            want: the layer.
            content: what `linear.dequantised` gave, if it was called already.
        """
        if want.fingerprint is None or self.linear.dequantised is None:
            return None
        if want.shape is not None and want.shape != self.shape:
            return "different"
        weight, step = content or self.linear.dequantised()
        outputs, inputs = self.shape
        at = sample_positions(outputs * inputs)
        if want.stored_in_out:
            into, out = np.unravel_index(at, (inputs, outputs))
        else:
            out, into = np.unravel_index(at, (outputs, inputs))
        out = out + self.rows.start
        expected = np.frombuffer(want.fingerprint.samples, "<u2").view(ml_dtypes.bfloat16)
        exact = expected.astype(np.float64)
        error = np.abs(weight[out, into] - exact)
        # The largest value of a block may be clipped by up to a step.
        fits = error <= step[out, into] * 1.01 + SAMPLE_RTOL * np.abs(exact)
        return "precision" if fits.all() else "different"

    def describe(self) -> str:
        """The site for a list that a person chooses from."""
        part = "" if self.start is None else f"[{self.rows.start}:{self.rows.stop}]"
        return f"{self.linear.weight}{part} {list(self.shape)} ({self.linear.kind})"


def whole(linear: QuantisedLinear) -> QuantisedSite:
    """A linear node that is one layer."""
    return QuantisedSite(linear, None, linear.shape)


def by_node(
    sites: Mapping[str, Sequence[QuantisedSite]],
) -> Iterator[tuple[QuantisedLinear, dict[str, slice]]]:
    """Each linear node once, with the layers in it and their outputs.

    Args:
        sites: layer -> where it is.
    """
    found: dict[QuantisedLinear, dict[str, slice]] = {}
    for layer, several in sites.items():
        for one in several:
            found.setdefault(one.linear, {})[layer] = one.rows
    yield from found.items()


def all_paths(linears: Iterable[QuantisedLinear]) -> Iterator[str]:
    """Module paths of quantised layers."""
    for one in linears:
        yield from one.paths
