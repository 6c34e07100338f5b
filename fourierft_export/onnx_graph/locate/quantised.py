"""Linear layers with quantised weights, of whatever form (`quantised_forms`).

Their weights stay as they are. What an adapter needs of them is where x comes in and y goes out in
float, and whether they are the layers it was trained on: dequantised samples against the bundle's
fingerprint, within a quantisation step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...types import Array

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
        transposed: the integers are (in, out).
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
    transposed: bool = False
    axis: int = 1
    block_size: int = 0
    bits: int = 8


def all_paths(linears: Iterable[QuantisedLinear]) -> Iterator[str]:
    """Module paths of quantised layers."""
    for one in linears:
        yield from one.paths
