"""delta_W as ONNX functions, by cosines and matrix products.

The DFT operator is not used: ONNX Runtime's kernel is slow, and wrong in the fourth digit at
lengths that are no power of two. Every operator here is in all execution providers, and with
constant inputs ONNX Runtime folds a call into one constant when it loads the model.

With C, S the tables of cosines and sines over half ranges (cos is even, sin is odd):

    CC = C_rows diag(c) C_columns^T,   SS = S_rows diag(c) S_columns^T
    delta_W[p, q] = CC - SS,   delta_W[p, -q] = delta_W[-p, q] = CC + SS

so a quarter of the matrix gives the rest by mirroring. Phases are integers modulo the length, and
their sines are taken in double precision: angles built in float32 would cost two digits. ONNX
Runtime has no Cos of doubles before 1.29, so cos(2 pi k / N) is sin(2 pi (4 k + N) / (4 N)).
Tables are a function of their own, so that layers with the same entries share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ..graph.ops import Ops
from ..locate.site import Site

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "fourierft_export"
IR_VERSION = 8  # the first with model-local functions
TABLE_OUTPUTS = ("cosines", "sines", "mirrored")

# Per side of the matrix. entries [n, 2] int64 -> cosines and sines [length / 2 + 1, n] float32 of
# 2 pi f p / length, divided by length, where f is column `axis` of the entries and p counts
# positions 0 .. length / 2; and mirrored [1], the last position that has a mirror image.
_TABLE_TEXT = """
<domain: "fourierft_export", opset_import: ["": OPSET]>
FourierTable <axis, length> (entries) => (cosines, sines, mirrored) {
    axis_index = Constant <value_int: int = @axis> ()
    frequencies = Gather <axis = 1> (entries, axis_index)
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    two = Constant <value_int: int = 2> ()
    count = Constant <value_int: int = @length> ()
    half = Div (count, two)
    stop = Add (half, one)
    positions = Range (zero, stop, one)
    last_axis = Constant <value_ints: ints = [1]> ()
    position_column = Unsqueeze (positions, last_axis)
    product = Mul (position_column, frequencies)
    phases = Mod (product, count)
    all_phases = Range (zero, count, one)
    count_double = Cast <to = 11> (count)
    quarter_turn = Constant <value = double {1.5707963267948966}> ()
    quarter_step = Div (quarter_turn, count_double)
    four = Constant <value_int: int = 4> ()
    quarter_phases = Mul (all_phases, four)
    shifted_phases = Add (quarter_phases, count)
    quarter_phases_double = Cast <to = 11> (quarter_phases)
    shifted_phases_double = Cast <to = 11> (shifted_phases)
    angles = Mul (quarter_phases_double, quarter_step)
    shifted_angles = Mul (shifted_phases_double, quarter_step)
    cosine_double = Sin (shifted_angles)
    sine_double = Sin (angles)
    cosine_normalised = Div (cosine_double, count_double)
    sine_normalised = Div (sine_double, count_double)
    cosine_of_phase = Cast <to = 1> (cosine_normalised)
    sine_of_phase = Cast <to = 1> (sine_normalised)
    cosines = Gather <axis = 0> (cosine_of_phase, phases)
    sines = Gather <axis = 0> (sine_of_phase, phases)
    last = Sub (count, one)
    half_of_last = Div (last, two)
    first_axis = Constant <value_ints: ints = [0]> ()
    mirrored = Unsqueeze (half_of_last, first_axis)
}
"""

# spectrum [n] any float, scaling [] float32, tables of the rows and of the columns -> delta
# [rows, columns] float32. Mirrored parts run from the last mirrored position back to position 1.
# No two calls share a Gemm's second factor: ONNX Runtime's quantiser would make equal names of it.
_DELTA_TEXT = """
<domain: "fourierft_export", opset_import: ["": OPSET]>
FourierDelta
(spectrum, scaling, row_cosines, row_sines, mirrored_row,
 column_cosines, column_sines, mirrored_column) => (delta) {
    coefficients = Cast <to = 1> (spectrum)
    scaled = Mul (coefficients, scaling)
    weighted_cosines = Mul (column_cosines, scaled)
    weighted_sines = Mul (column_sines, scaled)
    cosine_part = Gemm <transB = 1> (row_cosines, weighted_cosines)
    sine_part = Gemm <transB = 1> (row_sines, weighted_sines)
    straight = Sub (cosine_part, sine_part)
    crossed = Add (cosine_part, sine_part)
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    back = Constant <value_ints: ints = [-1]> ()
    two_zeros = Constant <value_ints: ints = [0, 0]> ()
    two_backs = Constant <value_ints: ints = [-1, -1]> ()
    both_axes = Constant <value_ints: ints = [0, 1]> ()
    mirrored_both = Concat <axis = 0> (mirrored_row, mirrored_column)
    upper_right = Slice (crossed, mirrored_column, zero, one, back)
    lower_left = Slice (crossed, mirrored_row, zero, zero, back)
    lower_right = Slice (straight, mirrored_both, two_zeros, both_axes, two_backs)
    upper = Concat <axis = 1> (straight, upper_right)
    lower = Concat <axis = 1> (lower_left, lower_right)
    delta = Concat <axis = 0> (upper, lower)
}
"""


@lru_cache(maxsize=4)
def _protos(opset: int) -> tuple[bytes, ...]:
    import onnx.parser

    return tuple(
        onnx.parser.parse_function(text.replace("OPSET", str(opset))).SerializeToString()
        for text in (_TABLE_TEXT, _DELTA_TEXT)
    )


def add_functions(model: ir.Model) -> None:
    """Give `model`, of opset 18 or newer, the functions in its own opset, as ONNX wants."""
    import onnx
    import onnx_ir as ir

    for data in _protos(model.opset_imports[""]):
        function = ir.serde.deserialize_function(onnx.FunctionProto.FromString(data))
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    model.ir_version = max(model.ir_version, IR_VERSION)


def call_table(
    ops: Ops, entries: ir.Value, axis: int, length: int, name: str
) -> Sequence[ir.Value]:
    """The outputs of FourierTable for one side of the matrix."""
    return ops.ops(
        "FourierTable", [entries], name, TABLE_OUTPUTS, domain=DOMAIN, axis=axis, length=length
    )


def call_delta(
    ops: Ops,
    site: Site,
    spectrum: ir.Value,
    scaling: ir.Value,
    tables: Sequence[Sequence[ir.Value]],
    name: str,
) -> ir.Value:
    """delta_W in the layout of the site's weight, with zeros around a part of a packed one.

    Args:
        ops: of the graph.
        site: where the layer is.
        spectrum: [n], any float.
        scaling: [], float32.
        tables: those of the layer's outputs, then of its inputs.
        name: of the new node.
    """
    rows, columns = reversed(tables) if site.transposed else tables
    delta = ops.op("FourierDelta", [spectrum, scaling, *rows, *columns], name, domain=DOMAIN)
    if site.start is None:
        return delta
    pads = np.zeros((2, 2), np.int64)
    pads[:, int(site.transposed)] = site.start, site.outputs - site.rows.stop
    return ops.op(
        "Pad", [delta, ops.initializer(pads.reshape(-1), f"{name}.pads")], f"{name}.padded"
    )
