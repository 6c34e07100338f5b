"""Banks on graphs with ONNX Runtime's own operators, behind which onnx knows no shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import fourierft_export as ff
from fourierft_export.errors import UsageError
from fourierft_export.onnx_graph.graph import shapes

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]
MINE = "com.microsoft"


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


X = floats(3, 5, 16)
NORM = (floats(16), floats(16))
# Operator, how many of its inputs are x, the other inputs (what has the batch is fed), attributes,
# outputs, domain.
CASES: dict[str, tuple[int, list[Any], dict[str, Any], int, str]] = {
    "Attention": (1, [floats(16, 48), floats(48)], {"num_heads": 2}, 1, MINE),
    "BiasGelu": (1, [floats(16)], {}, 1, MINE),
    "FastGelu": (1, [floats(16)], {}, 1, MINE),
    "GroupQueryAttention": (
        3,
        [
            floats(3, 2, 0, 8),
            floats(3, 2, 0, 8),
            np.full(3, 4, np.int32),
            np.array(5, np.int32),
        ],
        {"num_heads": 2, "kv_num_heads": 2},
        3,
        MINE,
    ),
    "MatMulNBits": (
        1,
        [np.arange(256, dtype=np.uint8).reshape(16, 1, 16), floats(16)],
        {"K": 16, "N": 16, "bits": 4, "block_size": 32},
        1,
        MINE,
    ),
    "MultiHeadAttention": (3, [], {"num_heads": 2}, 1, MINE),
    "QuickGelu": (1, [], {}, 1, MINE),
    "SimplifiedLayerNormalization": (1, [floats(16)], {}, 1, ""),
    "SkipLayerNormalization": (2, [*NORM], {}, 4, MINE),
    "SkipSimplifiedLayerNormalization": (2, [floats(16)], {}, 4, MINE),
}


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    fed: dict[str, np.ndarray],
    outputs: tuple[str, ...],
) -> None:
    """A model of x [batch, tokens, 16] and `fed`, whose outputs say nothing of their shapes."""
    inputs = [helper.make_tensor_value_info("x", 1, ["batch", "tokens", 16])]
    for name, array in fed.items():
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        inputs.append(helper.make_tensor_value_info(name, dtype, ["batch", *array.shape[1:]]))
    values = [helper.make_empty_tensor_value_info(name) for name in outputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, values, tensors)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MINE, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


@pytest.mark.parametrize("kind", CASES)
def test_a_bank_behind_an_operator_of_onnxruntime(
    kind: str, tmp_path: Path, run: Run, make_bundle: Any, exact_delta: Any
) -> None:
    """Each row gets its own adapter: y + operator(x) delta_W^T, against float64."""
    count, others, attributes, outputs, domain = CASES[kind]
    weight = floats(16, 4)
    arrays = {f"w{i}": array for i, array in enumerate(others)}
    fed = {name: array for name, array in arrays.items() if array.shape[:1] == (3,)}
    constants = {name: arrays[name] for name in arrays.keys() - fed.keys()}
    names = ["inner", "inner.1", "inner.2", "sum"][:outputs]
    inputs = [*["x"] * count, *arrays]
    nodes = [
        helper.make_node(kind, inputs, names, domain=domain, **attributes),
        helper.make_node("Transpose", ["layer.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["inner", "turned"], ["y"], name="/layer/MatMul"),
    ]
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(path, nodes, constants | {"layer.weight": weight.T}, fed, ("y", "inner"))
    bundles = {
        name: make_bundle(["layer"], {"layer": weight.T}, seed=seed, scaling=60.0)
        for name, seed in (("a", 1), ("b", 2))
    }
    ff.apply_onnx(path, bundles, out, mode="bank")
    got = run(out, {"x": X, **fed, "adapter_id": np.array([2, 0, 1])})
    inner = got["inner"].astype(np.float64)
    for row, name in enumerate(("b", None, "a")):
        full = weight.T.astype(np.float64)
        if name is not None:
            full = full + exact_delta(bundles[name], "layer", (4, 16))
        want = inner[row] @ full.T
        np.testing.assert_allclose(got["y"][row], want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kinds", [("Add", "Mul"), ("Max", "Sub"), ("Concat",), ("Mul",)])
@pytest.mark.parametrize("start", ["sizes", "constant"])
def test_sizes_that_grow_without_end(
    start: str, kinds: tuple[str, ...], tmp_path: Path, make_bundle: Any
) -> None:
    """Steps that double an expression, a number or a list of sizes end the inference, at once."""
    nodes = [
        helper.make_node("FastGelu", ["x"], ["inner"], domain=MINE),
        helper.make_node("MatMul", ["inner", "layer.weight"], ["y"], name="/layer/MatMul"),
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("ConstantOfShape", ["huge"], ["zeros"]),
    ]
    last = start
    for step in range(60):
        kind, new = kinds[step % len(kinds)], f"{start}.{step}"
        extra = {"axis": 0} if kind == "Concat" else {}
        nodes.append(helper.make_node(kind, [last, last if step % 3 else start], [new], **extra))
        last = new
    constants = {
        "layer.weight": floats(16, 4),
        "constant": np.array([3, 5, 7]),
        "huge": np.array([1 << 20, 1 << 20]),
    }
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(path, nodes, constants, {}, ("y", last, "zeros"))
    report = ff.apply_onnx(path, make_bundle(["layer"]), out, mode="bank")
    assert report.outputs["y"] == ("batch", "tokens", 4)


def test_subgraphs_nested_without_end(tmp_path: Path, make_bundle: Any) -> None:
    """Symbolic inference copies the branch that is taken over the other: 2^30 graphs in the end."""
    value = helper.make_empty_tensor_value_info
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["o"])], "o", [], [value("o")])
    graph, last = other, "o"
    for depth in range(30):
        last = f"o{depth}"
        branch = helper.make_node("If", ["yes"], [last], then_branch=graph, else_branch=other)
        graph = helper.make_graph([branch], last, [], [value(last)])
    nodes = [
        helper.make_node("FastGelu", ["x"], ["inner"], domain=MINE),
        helper.make_node("MatMul", ["inner", "layer.weight"], ["y"], name="/layer/MatMul"),
        branch,
    ]
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(path, nodes, {"layer.weight": floats(16, 4), "yes": np.array(True)}, {}, ("y", last))
    report = ff.apply_onnx(path, make_bundle(["layer"]), out, mode="bank")
    assert report.outputs["y"] == ("batch", "tokens", 4)


def test_another_version_of_symbolic_inference(
    tmp_path: Path, make_bundle: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """It can be bounded by private attributes only: without them it is not used, and that said."""
    monkeypatch.setattr(shapes, "_PRIVATE", ("dispatcher_", "gone_"))
    shapes._load_symbolic_inference.cache_clear()
    attention = helper.make_node("Attention", ["x", "w", "b"], ["inner"], domain=MINE, num_heads=2)
    product = helper.make_node("MatMul", ["inner", "layer.weight"], ["y"], name="/layer/MatMul")
    constants = {"layer.weight": floats(16, 4), "w": floats(16, 48), "b": floats(48)}
    path = tmp_path / "in.onnx"
    save(path, [attention, product], constants, {}, ("y",))
    with pytest.raises(UsageError, match="or an unknown one"):
        ff.apply_onnx(path, make_bundle(["layer"]), tmp_path / "out.onnx", mode="bank")
    assert "this version of it has no gone_" in caplog.text
    shapes._load_symbolic_inference.cache_clear()
