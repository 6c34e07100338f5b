"""Shapes of values behind ONNX Runtime's own operators, against what it computes there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fourierft_export.onnx_graph.graph.shapes import fill_shapes
from fourierft_export.onnx_graph.graph.source import open_onnx

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]
SIZES = {"batch": 3, "tokens": 5}


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def integers(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 9, shape).astype(dtype)


ONE, ZERO = np.float32(0.1), np.uint8(1)
NORM = (floats(8), floats(8))
X, IDS, BYTES = floats(3, 5, 8), integers(3, 5, dtype="int32"), integers(3, 5, 8)
MINE = "com.microsoft"

# Operator, what is fed (its first two sizes are the batch and the tokens) in the places of None,
# the other inputs, attributes, number of outputs, domain.
CASES: dict[str, tuple[list[np.ndarray], list[Any], dict[str, Any], int, str]] = {
    "Attention": ([X], [None, floats(8, 24), floats(24)], {"num_heads": 2}, 1, MINE),
    "Attention of other sizes": (
        [X],
        [None, floats(8, 20), floats(20)],
        {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 4]},
        1,
        MINE,
    ),
    "BiasGelu": ([X], [None, floats(8)], {}, 1, MINE),
    "DynamicQuantizeMatMul": (
        [X],
        [None, integers(8, 6), floats(6), integers(6)],
        {},
        1,
        MINE,
    ),
    "EmbedLayerNormalization": (
        [IDS, IDS * 0],
        [None, None, floats(9, 8), floats(7, 8), floats(2, 8), *NORM],
        {},
        2,
        MINE,
    ),
    "FastGelu": ([X], [None, floats(8)], {}, 1, MINE),
    "FusedGemm": (
        [floats(3, 8)],
        [None, floats(6, 8), floats(6)],
        {"transB": 1, "activation": "Relu"},
        1,
        MINE,
    ),
    "FusedMatMul": ([X], [None, floats(6, 8)], {"transB": 1, "alpha": 0.5}, 1, MINE),
    "Gelu": ([X], [None], {}, 1, MINE),
    "GroupQueryAttention": (
        [floats(3, 5, 16), X, X],
        [
            None,
            None,
            None,
            floats(3, 1, 0, 8),
            floats(3, 1, 0, 8),
            np.full(3, 4, np.int32),
            np.array(5, np.int32),
        ],
        {"num_heads": 2, "kv_num_heads": 1},
        3,
        MINE,
    ),
    "MatMulIntegerToFloat": (
        [BYTES],
        [None, integers(8, 6), ONE, ONE],
        {},
        1,
        MINE,
    ),
    "MatMulNBits": (
        [floats(3, 5, 32)],
        [None, integers(6, 1, 16), floats(6)],
        {"K": 32, "N": 6, "bits": 4, "block_size": 32},
        1,
        MINE,
    ),
    "MultiHeadAttention": ([X, X, floats(3, 5, 4)], [None] * 3, {"num_heads": 2}, 1, MINE),
    "QAttention": (
        [BYTES],
        [None, integers(8, 24), floats(24), ONE, ONE, None, ZERO, ZERO],
        {"num_heads": 2},
        1,
        MINE,
    ),
    "QEmbedLayerNormalization": (
        [IDS, IDS * 0],
        [
            None,
            None,
            *(integers(9, 8), integers(7, 8), integers(2, 8), integers(8), integers(8)),
            None,
            *[ONE] * 5,
            *[ZERO] * 5,
        ],
        {},
        2,
        MINE,
    ),
    "QGemm": (
        [integers(3, 8)],
        [None, ONE, ZERO, integers(6, 8), ONE, ZERO, integers(6, dtype="int32"), ONE, ZERO],
        {"transB": 1},
        1,
        MINE,
    ),
    "QGemm to float": (
        [integers(3, 8)],
        [None, ONE, ZERO, integers(8, 6), ONE, ZERO],
        {},
        1,
        MINE,
    ),
    "QLinearAdd": ([BYTES], [None, ONE, ZERO, integers(8), ONE, ZERO, ONE, ZERO], {}, 1, MINE),
    "QLinearConcat": (
        [BYTES, BYTES],
        [ONE, ZERO, None, ONE, ZERO, None, ONE, ZERO],
        {"axis": 2},
        1,
        MINE,
    ),
    "QLinearSigmoid": ([BYTES], [None, ONE, ZERO, ONE, ZERO], {}, 1, MINE),
    "QuickGelu": ([X], [None], {}, 1, MINE),
    "SimplifiedLayerNormalization": ([X], [None, floats(8)], {}, 1, ""),
    "SkipLayerNormalization": ([X, X], [None, None, *NORM], {}, 4, MINE),
    "SkipSimplifiedLayerNormalization": ([X, X], [None, None, floats(8)], {}, 4, MINE),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes_behind_onnxruntimes_operators(name: str, tmp_path: Path, run: Run) -> None:
    """Behind a node whose output is not told, the shape and type are those that come out."""
    fed, inputs, attributes, count, domain = CASES[name]
    kind, path = name.split(" ")[0], tmp_path / "in.onnx"
    feeds = {f"x{i}": array for i, array in enumerate(fed)}
    names, free = [], iter(feeds)
    weights = []
    for i, array in enumerate(inputs):
        if array is None:
            names.append(next(free, ""))
        else:
            names.append(f"w{i}")
            weights.append(numpy_helper.from_array(np.asarray(array), f"w{i}"))
    outputs = ["y", *[f"y{i}" for i in range(1, count)]]
    nodes = [
        helper.make_node(kind, names, outputs, domain=domain, **attributes),
        helper.make_node("Identity", ["y"], ["z"]),
    ]
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(
                name,
                types[name],
                [*SIZES, *array.shape[2:]][: array.ndim]
                if array.ndim > 2 or array.dtype == np.int32
                else ["batch", *array.shape[1:]],
            )
            for name, array in feeds.items()
        ],
        [helper.make_empty_tensor_value_info("z")],
        weights,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    model = open_onnx(path).model
    fill_shapes(model)
    got = run(path, feeds)["z"]
    value = model.graph[1].outputs[0]
    assert value.shape is not None
    assert value.dtype is not None
    sizes = [size if isinstance(size, int) else SIZES.get(str(size)) for size in value.shape]
    assert sizes == list(got.shape)
    assert value.dtype.numpy() == got.dtype
    assert str(value.shape[0]) == "batch"
    if count > 3:
        assert model.graph[0].outputs[3].shape == value.shape
    # Only what is told has changed.
    assert [node.op_type for node in model.graph] == [kind, "Identity"]
    assert [value.name for value in model.graph.inputs] == list(feeds)
