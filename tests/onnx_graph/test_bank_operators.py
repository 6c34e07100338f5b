"""Banks behind operators of ONNX Runtime whose shapes this package infers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

import fourierft_export as ff

MS = {"domain": "com.microsoft"}
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 3).astype(np.float32)


def integers(*shape: int) -> np.ndarray:
    return RNG.integers(-100, 100, shape).astype(np.int8)


def bytes_of(*shape: int) -> np.ndarray:
    return RNG.integers(0, 200, shape).astype(np.uint8)


SCALE, ZERO, ZERO8 = np.float32(0.02), np.uint8(100), np.int8(0)
QUANTISE = ("QuantizeLinear", ["x", "s", "z"], ["q"])
BACK = ("DequantizeLinear", ["p", "s", "z"], ["h"])
SIZES = {"s": SCALE, "z": ZERO, "s8": SCALE, "z8": ZERO8}
# Operator -> nodes from x (batch, 3, 8), or (batch, 8), to h (..., 8), constants, x's shape.
OPERATORS: dict[str, tuple[list[Any], dict[str, Any], list[Any]]] = {
    "FusedMatMul": (
        [("FusedMatMul", ["x", "w"], ["h"], MS | {"transB": 1, "alpha": 0.5})],
        {"w": floats(8, 8)},
        ["batch", 3, 8],
    ),
    "TransposeMatMul": (
        [("TransposeMatMul", ["x", "w"], ["h"], MS | {"transB": 1})],
        {"w": floats(8, 8)},
        ["batch", 3, 8],
    ),
    "FusedGemm": (
        [("FusedGemm", ["x", "w", "b"], ["h"], MS | {"transB": 1, "activation": "Relu"})],
        {"w": floats(8, 8), "b": floats(8)},
        ["batch", 8],
    ),
    "DynamicQuantizeMatMul": (
        [("DynamicQuantizeMatMul", ["x", "w", "s8", "z8"], ["h"], MS)],
        SIZES | {"w": integers(8, 8)},
        ["batch", 3, 8],
    ),
    "MatMulIntegerToFloat": (
        [QUANTISE, ("MatMulIntegerToFloat", ["q", "w", "s", "s8", "z", "z8"], ["h"], MS)],
        SIZES | {"w": integers(8, 8)},
        ["batch", 3, 8],
    ),
    "MatMulBnb4": (
        [
            (
                "MatMulBnb4",
                ["x", "w", "m"],
                ["h"],
                MS | {"K": 8, "N": 8, "block_size": 16, "quant_type": 1},
            )
        ],
        {"w": bytes_of(32), "m": np.abs(floats(4)) + 1},
        ["batch", 3, 8],
    ),
    "QGemm": (
        [
            QUANTISE,
            ("QGemm", ["q", "s", "z", "w", "s8", "z8", "", "s", "z"], ["p"], MS | {"transB": 1}),
            BACK,
        ],
        SIZES | {"w": integers(8, 8)},
        ["batch", 8],
    ),
    "QLinearConcat": (
        [
            ("Split", ["x"], ["a", "b"], {"axis": -1, "num_outputs": 2}),
            ("QuantizeLinear", ["a", "s", "z"], ["qa"]),
            ("QuantizeLinear", ["b", "s", "z"], ["qb"]),
            ("QLinearConcat", ["s", "z", "qa", "s", "z", "qb", "s", "z"], ["p"], MS | {"axis": -1}),
            BACK,
        ],
        SIZES,
        ["batch", 3, 8],
    ),
    "QLinearSigmoid": (
        [QUANTISE, ("QLinearSigmoid", ["q", "s", "z", "s", "z"], ["p"], MS), BACK],
        SIZES,
        ["batch", 3, 8],
    ),
    "QAttention": (
        [
            QUANTISE,
            ("QAttention", ["q", "w", "b", "s", "s8", "", "z", "z8"], ["h"], MS | {"num_heads": 2}),
        ],
        SIZES | {"w": integers(8, 24), "b": floats(24)},
        ["batch", 3, 8],
    ),
    "QEmbedLayerNormalization": (
        [
            ("Cast", ["x"], ["ids"], {"to": TensorProto.INT32}),
            (
                "QEmbedLayerNormalization",
                ["ids", "", *"tp", "", *"gb", "", *"ss", "", *"sszz", "", *"zz"],
                ["h", "mask"],
                MS,
            ),
        ],
        SIZES | {"t": bytes_of(9, 8), "p": bytes_of(3, 8), "g": bytes_of(8), "b": bytes_of(8)},
        ["batch", 3],
    ),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_behind(
    operator: str, make_bundle: Any, tmp_path: Path, write_onnx: Any, run: Any
) -> None:
    """Row 0 has the adapter, row 1 the base, although the file says nothing of shapes."""
    nodes, constants, shape = OPERATORS[operator]
    flat = ("Reshape", ["h", "flat"], ["r"])
    product = ("MatMul", ["r", "lin.weight"], ["y"], {"name": "/lin/MatMul"})
    weight = floats(8, 5)
    held = constants | {"lin.weight": weight, "flat": np.array([-1, 8])}
    plain, merged, bank = (tmp_path / f"{name}.onnx" for name in ("plain", "merged", "bank"))
    write_onnx(plain, [*nodes, flat, product], held, {"x": shape}, {"y": None})
    bundle = make_bundle(["lin"], {"lin": np.ascontiguousarray(weight.T)})
    ff.apply_onnx(plain, bundle, merged)
    ff.apply_onnx(plain, {"a": bundle}, bank, mode="bank")
    x = np.abs(floats(2, *shape[1:])) * 5
    adapted, base = (run(path, {"x": x})["y"] for path in (merged, plain))
    got = run(bank, {"x": x, "adapter_id": np.array([1, 0])})["y"]
    half = len(got) // 2
    np.testing.assert_allclose(got[:half], adapted[:half], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[half:], base[half:], rtol=0, atol=1e-5)
    assert np.abs(adapted - base).max() > 0.01
