"""An adapter as a branch next to a linear layer: y + x delta_W^T, without building delta_W.

Plain operators only, so it runs on every execution provider, also next to a quantised weight.
With A_v, B_v the cosine and sine transforms of x (v = 0 .. N/2: the rest is mirrored), and each
entry folded there (sigma is -1 if just one of u, v was mirrored, as the sine is odd):

    y[p] += scaling / (M N) * sum_k c_k (cos(2 pi u_k p / M) A_(v_k) - sigma_k sin(...) B_(v_k))

Dense form, for lengths up to about a thousand: three products with constant tables of cosines and
sines and with a small matrix into which the coefficients are scattered; its cost does not depend
on n. Two-step form, for long lengths N = a b: each transform is two batched products (a near
sqrt(N)) with the twiddle factors in the second one's tables, and the entries are gathered and
added back. Layers with the same input share its transform. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..adapter_interface import PREFIX, Group
from ..graph.ops import FLOAT32, Ops, replace_uses
from .cosine_transforms import Transforms, is_dense
from .find_layer_ends import Ends

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Frequencies:
    """One group's adapter tensors, prepared once for all of its layers.

    Attributes:
        shape: (M, N) of the layers.
        cosine: (..., L, n) what multiplies the cosine transform.
        sine: (..., L, n) what multiplies the sine transform.
        read: (..., n) int64 places in x's transform; None in the dense form.
        write: (..., n) int64 places in y's transform; dense: in the scattered matrix.
        batch: int64 [1], the number of rows that have their own adapter; None if all share one.
    """

    shape: tuple[int, int]
    cosine: ir.Value
    sine: ir.Value
    read: ir.Value | None
    write: ir.Value
    batch: ir.Value | None


class SideBranches:
    """Writes side branches into one graph of opset 16 or newer."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self._transforms = Transforms(ops)
        self._int = self._transforms.integers
        self._transformed: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}

    def add_group(
        self,
        group: Group,
        tensors: tuple[ir.Value, ir.Value, ir.Value],
        ends: Mapping[str, Sequence[Ends]],
        batch: ir.Value | None = None,
    ) -> dict[str, list[ir.Value]]:
        """Add the adapter's shares to the layers of a group.

        Args:
            group: of the adapter inputs.
            tensors: its spectrum, entries and scaling.
            ends: layer -> where its x comes in and its y goes out.
            batch: int64 [1], the number of rows, where each row has its own adapter.

        Returns:
            Layer -> the sums.
        """
        spectrum, entries, scaling = tensors
        if group.dtype != "float32":
            spectrum = self.ops.op("Cast", [spectrum], f"{group.spectrum}.float32", to=FLOAT32)
        name = f"{PREFIX}group.{group.index}"
        frequencies = self.group(spectrum, entries, scaling, group.shape, name=name, batch=batch)
        added: dict[str, list[ir.Value]] = {layer: [] for layer in group.layers}
        for row, layer in enumerate(group.layers):
            for number, end in enumerate(ends[layer]):
                name = f"{layer}.adapter" + (f".{number}" if number else "")
                total = self.add(frequencies, row, end.x, end.y, name=name, factor=end.factor)
                added[layer].append(total)
        return added

    def group(
        self,
        spectrum: ir.Value,
        entries: ir.Value,
        scaling: ir.Value,
        shape: tuple[int, int],
        *,
        name: str,
        batch: ir.Value | None = None,
    ) -> Frequencies:
        """Prepare the adapter tensors of layers of one shape.

        Args:
            spectrum: [L, n] float32; with `batch` [B, L, n], per row of the batch its own.
            entries: [n, 2] int64; with `batch` [B, n, 2].
            scaling: [L] float32; with `batch` [B, L].
            shape: (M, N) = (out_features, in_features).
            name: start of the new nodes' names.
            batch: int64 [1], B; by default every row of x has the same adapter.
        """
        op, rows, columns = self.ops.op, *shape
        axis = self._int([-1], "last")
        scaled = op("Mul", [spectrum, op("Unsqueeze", [scaling, axis], f"{name}.s")], f"{name}.c")
        u, v = (
            op("Gather", [entries, self._int(i, f"axis{i}")], f"{name}.{'uv'[i]}", axis=-1)
            for i in (0, 1)
        )
        if not is_dense(shape):
            return Frequencies(shape, scaled, scaled, v, u, batch)
        (u, u_mirrored), (v, v_mirrored) = (
            self._folded(value, length, f"{name}.{side}")
            for value, length, side in ((u, rows, "u"), (v, columns, "v"))
        )
        odd = op("Xor", [u_mirrored, v_mirrored], f"{name}.odd")  # tract has no Equal of bools
        # The sum starts with minus sin sin.
        signs = (
            self.ops.constant(np.array(x, np.float32), f"fourier.sign{x:.0f}") for x in (1.0, -1.0)
        )
        sign = op("Where", [odd, *signs], f"{name}.sign")
        if batch is not None:
            sign = op("Unsqueeze", [sign, self._int([1], "layer_axis")], f"{name}.signs")
        sine = op("Mul", [scaled, sign], f"{name}.signed")
        start = op("Mul", [v, self._int(rows // 2 + 1, f"half{rows}")], f"{name}.row")
        return Frequencies(shape, scaled, sine, None, op("Add", [start, u], f"{name}.place"), batch)

    def add(
        self,
        frequencies: Frequencies,
        row: int,
        x: ir.Value,
        y: ir.Value,
        *,
        name: str,
        factor: float = 1.0,
    ) -> ir.Value:
        """Add the adapter's share to a linear layer; whatever used `y` uses the sum afterwards.

        Args:
            frequencies: from `group`.
            row: which of the group's layers this is.
            x: the layer's input (..., N), float32, float16 or bfloat16; with a batch, its first
                dimension is the batch, or the batch times other dimensions.
            y: the layer's output (..., M), with its bias or before it.
            name: start of the new nodes' names.
            factor: the share is multiplied with it.

        Returns:
            The sum, of y's dtype and shape; a graph output keeps its name.
        """
        import onnx_ir as ir

        op, users = self.ops.op, tuple(y.uses())
        dtype = y.dtype or x.dtype or ir.DataType.FLOAT
        exact = dtype == ir.DataType.FLOAT
        index = self._int(row, f"layer{row}")
        given = (frequencies.cosine, "cosine"), (frequencies.sine, "sine")
        even, odd = (
            self._middle(
                frequencies,
                part,
                op("Gather", [coefficients, index], f"{name}.{what}", axis=-2),
                f"{name}.{what}",
            )
            for part, (coefficients, what) in zip(
                self._transform(frequencies, x, exact), given, strict=True
            )
        )
        dense, rows = frequencies.read is None, frequencies.shape[0]
        inverse = self._transforms.dense_inverse if dense else self._transforms.two_step_inverse
        delta = inverse(even, odd, rows, name)
        if factor != 1:
            number = self.ops.constant(np.array(factor, np.float32), f"fourier.factor{factor}")
            delta = op("Mul", [delta, number], f"{name}.times")
        if not dense or frequencies.batch is not None:
            delta = op("Reshape", [delta, op("Shape", [y], f"{name}.shape")], f"{name}.as_y")
        if not exact:
            delta = op("Cast", [delta], f"{name}.rounded", to=int(dtype))
        total = op("Add", [y, delta], f"{name}.adapted")
        replace_uses(users, y, total)
        return total

    def _folded(self, value: ir.Value, length: int, name: str) -> tuple[ir.Value, ir.Value]:
        """Frequencies brought to 0 .. length / 2, and which were mirrored."""
        op = self.ops.op
        other = op("Sub", [self._int(length, f"length{length}"), value], f"{name}.other")
        folded = op("Min", [value, other], f"{name}.folded")
        return folded, op("Greater", [value, other], f"{name}.mirrored")

    def _transform(
        self, frequencies: Frequencies, x: ir.Value, exact: bool
    ) -> tuple[ir.Value, ir.Value]:
        """The cosine and the sine transform of x over N, divided by N."""
        columns, batch, dense = frequencies.shape[1], frequencies.batch, frequencies.read is None
        key = x, columns, dense, batch
        if key not in self._transformed:
            name = f"{x.name}.{columns}"
            if not exact:
                x = self.ops.op("Cast", [x], f"{name}.float32", to=FLOAT32)
            if dense:
                if batch is not None:
                    x = self._by_row(x, batch, columns, f"{name}.rows")
                parts = self._transforms.dense_forward(x, columns, name)
            else:
                parts = self._transforms.two_step_forward(x, columns, name)
                if batch is not None:
                    parts = [self._by_row(p, batch, columns, f"{p.name}.rows") for p in parts]
            self._transformed[key] = parts[0], parts[1]
        return self._transformed[key]

    def _by_row(self, value: ir.Value, batch: ir.Value, size: int, name: str) -> ir.Value:
        """[B, ..., size] or [B * ..., size] as [B, tokens, size]."""
        rest = self._int([-1, size], f"tokens{size}")
        shape = self.ops.op("Concat", [batch, rest], f"{name}.shape", axis=0)
        return self.ops.op("Reshape", [value, shape], name)

    def _middle(
        self, frequencies: Frequencies, part: ir.Value, coefficients: ir.Value, name: str
    ) -> ir.Value:
        """From x's transform to y's: (..., N/2 + 1) to (..., M/2 + 1), or (..., N) to (..., M)."""
        op, (rows, columns), batch = self.ops.op, frequencies.shape, frequencies.batch
        if frequencies.read is None:
            height, width = columns // 2 + 1, rows // 2 + 1
            count = self._int([height * width], f"places{height}x{width}")
            if batch is not None:
                count = op("Concat", [batch, count], f"{name}.places", axis=0)
            zeros = op("ConstantOfShape", [count], f"{name}.zeros")
            matrix = self._added(zeros, frequencies.write, coefficients, f"{name}.scattered")
            sizes = [height, width] if batch is None else [-1, height, width]
            shape = self._int(sizes, f"matrix{height}x{width}")
            matrix = op("Reshape", [matrix, shape], f"{name}.matrix")
            return op("MatMul", [part, matrix], f"{name}.bins")
        read, write = frequencies.read, frequencies.write
        tokens = op("Shape", [part], f"{name}.tokens", end=-1)
        number = op("Shape", [coefficients], f"{name}.n", start=-1)
        every = op("Concat", [tokens, number], f"{name}.every", axis=0)
        if batch is None:
            values = op("Gather", [part, read], f"{name}.read", axis=-1)
        else:
            axis = self._int([1], "layer_axis")
            read, write, coefficients = (
                op("Unsqueeze", [value, axis], f"{name}.{what}")
                for value, what in ((read, "from"), (write, "to"), (coefficients, "factor"))
            )
            places = op("Expand", [read, every], f"{name}.places")
            values = op("GatherElements", [part, places], f"{name}.read", axis=2)
        scaled = op("Mul", [values, coefficients], f"{name}.scaled")
        size = op("Concat", [tokens, self._int([rows], f"rows{rows}")], f"{name}.size", axis=0)
        zeros = op("ConstantOfShape", [size], f"{name}.zeros")
        places = op("Expand", [write, every], f"{name}.write")
        return self._added(zeros, places, scaled, f"{name}.bins")

    def _added(self, to: ir.Value, places: ir.Value, values: ir.Value, name: str) -> ir.Value:
        """Two entries may fall on one place: they add up."""
        return self.ops.op("ScatterElements", [to, places, values], name, axis=-1, reduction="add")
