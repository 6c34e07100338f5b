"""The ONNX functions against the definition of delta_W, in two runtimes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fourierft_export.onnx_graph.modes import functions
from fourierft_export.spectral.delta import reference_delta

SHAPES = [
    (1, 1, 1),
    (1, 6, 4),
    (7, 1, 3),
    (2, 2, 4),
    (2, 9, 11),
    (5, 7, 35),
    (6, 8, 20),
    (13, 17, 30),
    (96, 31, 200),
    (64, 100, 1000),
]


def mirrored_entries(rng: np.random.Generator, rows: int, columns: int, n: int) -> np.ndarray:
    """n entries, among them, where there is room, one and its mirror image (-u, -v)."""
    first = rng.permutation(rows * columns)[:n]
    entries = np.stack([first // columns, first % columns], axis=1)
    mirror = (-entries[0]) % np.array([rows, columns])
    if n > 1 and not (entries == mirror).all(axis=1).any():
        entries[1] = mirror
    return entries


def delta_model(
    entries: np.ndarray, spectrum: np.ndarray, scaling: float, rows: int, columns: int, opset: int
) -> bytes:
    """A model whose one output is delta_W; `blank` is an input that does nothing."""
    rows_table, columns_table = (
        [f"{side}_{what}" for what in functions.TABLE_OUTPUTS] for side in ("rows", "columns")
    )
    domain = functions.DOMAIN
    nodes = [
        helper.make_node("FourierTable", ["e"], rows_table, domain=domain, axis=0, length=rows),
        helper.make_node(
            "FourierTable", ["e"], columns_table, domain=domain, axis=1, length=columns
        ),
        helper.make_node(
            "FourierDelta", ["c", "s", *rows_table, *columns_table], ["delta"], domain=domain
        ),
        helper.make_node("Add", ["delta", "blank"], ["out"]),
    ]
    constants = {"e": entries, "c": spectrum, "s": np.float32(scaling)}
    graph = helper.make_graph(
        nodes,
        "delta",
        [helper.make_tensor_value_info("blank", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = ir.serde.deserialize_model(proto)
    functions.add_functions(model)
    made = ir.serde.serialize_model(model)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def with_reference(data: bytes) -> Any:
    return ReferenceEvaluator(onnx.ModelProto.FromString(data)).run(
        None, {"blank": np.zeros(1, np.float32)}
    )[0]


def with_runtime(data: bytes) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"blank": np.zeros(1, np.float32)})[0]


@pytest.mark.parametrize("evaluate", [with_reference, with_runtime])
@pytest.mark.parametrize(("rows", "columns", "n"), SHAPES)
def test_delta_is_that_of_the_definition(evaluate: Any, rows: int, columns: int, n: int) -> None:
    rng = np.random.default_rng(rows * 1000 + columns)
    entries = mirrored_entries(rng, rows, columns, n)
    spectrum = rng.standard_normal(n).astype(np.float32)
    expected = reference_delta(spectrum, entries, (rows, columns), 3.0)
    got = evaluate(delta_model(entries, spectrum, 3.0, rows, columns, 20))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opset_and_half_precision_spectra(opset: int) -> None:
    rng = np.random.default_rng(1)
    entries = mirrored_entries(rng, 12, 10, 30)
    spectrum = rng.standard_normal(30).astype(np.float16)
    expected = reference_delta(spectrum, entries, (12, 10), -0.5)
    got = with_runtime(delta_model(entries, spectrum, -0.5, 12, 10, opset))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_no_transform_operator_is_used() -> None:
    rng = np.random.default_rng(2)
    data = delta_model(
        mirrored_entries(rng, 6, 8, 20), rng.standard_normal(20).astype(np.float32), 1.0, 6, 8, 20
    )
    operators = {
        node.op_type
        for function in onnx.ModelProto.FromString(data).functions
        for node in function.node
    }
    assert "Gemm" in operators
    assert not operators & {"DFT", "STFT"}
