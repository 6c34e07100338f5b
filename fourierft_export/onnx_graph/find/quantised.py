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
from ...models.base import Bridge
from .consumers import same_path
from .found import Wanted
from .source import Array

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
        block_size, bits: of MatMulNBits.
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

    def verdict(self, want: Wanted) -> str | None:
        """What the fingerprint says: "precision", "different", or None without one."""
        if want.fingerprint is None or self.dequantised is None:
            return None
        if want.shape is not None and want.shape != self.shape:
            return "different"
        weight, step = self.dequantised()
        if want.stored_in_out:
            weight, step = weight.T, step.T
        at = sample_positions(weight.size)
        expected = np.frombuffer(want.fingerprint.samples, "<u2").view(ml_dtypes.bfloat16)
        exact = expected.astype(np.float64)
        error = np.abs(weight.reshape(-1)[at] - exact)
        # The largest value of a block may be clipped by up to a step.
        fits = error <= step.reshape(-1)[at] * 1.01 + SAMPLE_RTOL * np.abs(exact)
        return "precision" if fits.all() else "different"


def find_quantised(
    linears: Sequence[QuantisedLinear],
    wanted: Iterable[Wanted],
    bridge: Bridge,
    mapping: Mapping[str, str],
) -> dict[str, tuple[list[QuantisedLinear], str | None]]:
    """The layers that are among `linears`, each with what its fingerprint says.

    Args:
        linears: of the graph.
        wanted: layers that have no float weight in it.
        bridge: from the adapter's paths to the graph's.
        mapping: layer -> name of a constant of integers.
    """
    found: dict[str, tuple[list[QuantisedLinear], str | None]] = {}
    for want in wanted:
        path = same_path(bridge.to_base(want.name))
        if want.name in mapping:
            hits = [one for one in linears if one.weight == mapping[want.name]]
        else:
            hits = [one for one in linears if path in map(same_path, one.paths)]
        if not hits and want.fingerprint is not None and want.name not in mapping:
            hits = [one for one in linears if one.verdict(want) == "precision"]
            hits = hits if len({one.weight for one in hits}) == 1 else []
        if hits:
            verdicts = {one.verdict(want) for one in hits}
            worst = "different" if "different" in verdicts else verdicts.pop()
            found[want.name] = hits, worst
    return found


def all_paths(linears: Iterable[QuantisedLinear]) -> Iterator[str]:
    """Module paths of quantised layers."""
    for one in linears:
        yield from one.paths
