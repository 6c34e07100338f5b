"""The side branch against x (W + delta_W)^T in float64, in both forms and two runtimes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from fourierft_export.onnx_graph.graph.ops import Ops
from fourierft_export.onnx_graph.modes import side_branch
from fourierft_export.onnx_graph.modes.cosine_transforms import is_dense
from fourierft_export.spectral.delta import reference_delta

ROWS, TOKENS, LAYERS = 3, 4, 2


def quiet() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options


def drawn(shape: tuple[int, int], n: int, seed: int) -> tuple[np.ndarray, ...]:
    """spectrum [L, n], entries [n, 2] with a mirrored pair, scaling [L]."""
    rng = np.random.default_rng(seed)
    flat = rng.permutation(shape[0] * shape[1])[:n]
    entries = np.stack([flat // shape[1], flat % shape[1]], axis=1)
    mirror = -entries[0] % np.array(shape)
    if not (entries == mirror).all(axis=1).any():
        entries[1] = mirror
    spectrum = rng.standard_normal((LAYERS, n)).astype(np.float32)
    return spectrum, entries, rng.uniform(10, 40, LAYERS).astype(np.float32)


def model(
    shape: tuple[int, int], adapters: list[np.ndarray], batched: bool, dtype: ir.DataType
) -> tuple[bytes, np.ndarray]:
    """x -> two linear layers that share x, with the adapters as overridable inputs."""
    rows, columns = shape
    x = ir.Value(name="x", shape=ir.Shape(["b", "t", columns]), type=ir.TensorType(dtype))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="test")
    ops = Ops(graph)
    weight = np.random.default_rng(9).standard_normal((columns, rows)).astype(dtype.numpy())
    w = ops.initializer(weight, "w")
    outputs = []
    for name in ("y0", "y1"):
        y = ops.op("MatMul", [x, w], name)
        y.type, y.shape = ir.TensorType(dtype), ir.Shape(["b", "t", rows])
        graph.outputs.append(y)
        outputs.append(y)
    branches = side_branch.SideBranches(ops)
    spectrum, entries, scaling = (
        ops.overridable(array, name)
        for array, name in zip(adapters, ("spectrum", "entries", "scaling"), strict=True)
    )
    batch = ops.constant(np.array([ROWS]), "batch") if batched else None
    group = branches.group(spectrum, entries, scaling, shape, name="g", batch=batch)
    for row, y in enumerate(outputs):
        branches.add(group, row, x, y, name=f"layer{row}")
    ops.finish()
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto)
    assert [o.name for o in proto.graph.output] == ["y0", "y1"]
    return proto.SerializeToString(), weight


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (7, 5), (1, 9), (36, 24)])
def test_side_branch(
    shape: tuple[int, int], batched: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_branch, "is_dense", lambda shape: dense)
    n = min(30, shape[0] * shape[1])
    each = [drawn(shape, n, seed) for seed in range(ROWS if batched else 1)]
    adapters = [np.stack(arrays) for arrays in zip(*each, strict=True)] if batched else [*each[0]]
    proto, weight = model(shape, adapters, batched, ir.DataType.FLOAT)
    x = np.random.default_rng(1).standard_normal((ROWS, TOKENS, shape[1])).astype(np.float32)
    session = ort.InferenceSession(proto, quiet(), providers=["CPUExecutionProvider"])
    results = [session.run(None, {"x": x}), ReferenceEvaluator(proto).run(None, {"x": x})]
    for row in range(ROWS):
        spectrum, entries, scaling = each[row if batched else 0]
        for layer in range(LAYERS):
            delta = reference_delta(spectrum[layer], entries, shape, float(scaling[layer]))
            want = x[row].astype(np.float64) @ (weight + delta.T)
            for result in results:
                error = np.abs(result[layer][row] - want).max()
                assert error <= 2e-6 * np.abs(want).max()


def test_half_precision_rounds_once() -> None:
    adapters = drawn((8, 12), 20, 3)
    proto, weight = model((8, 12), [*adapters], False, ir.DataType.FLOAT16)
    x = np.random.default_rng(1).standard_normal((ROWS, TOKENS, 12)).astype(np.float16)
    session = ort.InferenceSession(proto, quiet(), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0]
    delta = reference_delta(adapters[0][0], adapters[1], (8, 12), float(adapters[2][0]))
    want = x.astype(np.float64) @ (weight.astype(np.float64) + delta.T)
    assert y.dtype == np.float16
    assert np.abs(y - want).max() <= 3 * 2**-11 * np.abs(want).max()


def test_long_lengths_with_factors_go_in_two_steps() -> None:
    assert [is_dense(s) for s in ((768, 768), (4096, 4096), (4099, 4099), (3072, 768))] == [
        True,
        False,
        True,
        False,
    ]
