"""Adapted layers that feed one another with nothing between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import fourierft_export as ff

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]
LAYERS = ("a", "b", "c")


BESIDE = ("unmerged", "swappable", "bank")


@pytest.mark.parametrize(
    ("form", "mode"), [*itertools.product(["float", "4 bit"], BESIDE), ("float", "paired")]
)
def test_each_layer_gets_what_the_adapted_one_before_gives(
    form: str,
    mode: str,
    make_bundle: Any,
    exact_delta: Any,
    tmp_path: Path,
    run: Run,
    write_onnx: Any,
) -> None:
    """`y = x A^T B^T C^T`."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 32)).astype(np.float32)
    held = {name: rng.standard_normal((32, 32)).astype(np.float32) / 6 for name in LAYERS}
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    nodes = [
        ("MatMul", [x, f"{layer}.weight"], [y], {"name": f"/{layer}/MatMul"})
        for x, layer, y in (("x", "a", "t"), ("t", "b", "u"), ("u", "c", "y"))
    ]
    weights, shape = {f"{name}.weight": w.T for name, w in held.items()}, ["batch", 3, 32]
    write_onnx(source, nodes, weights, {"x": shape}, {"y": shape})
    bundle = make_bundle(list(LAYERS), held, scaling=30.0)
    exact = {name: weight.astype(np.float64) for name, weight in held.items()}
    if form == "4 bit":
        quantiser = MatMulNBitsQuantizer(onnx.load(source), 4, 16, is_symmetric=True)
        quantiser.process()
        quantiser.model.save_model_to_file(str(source))
        graph = onnx.load(source).graph
        held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        products = [node for node in graph.node if node.op_type == "MatMulNBits"]
        for name, node in zip(LAYERS, products, strict=True):
            packed, scales = held[node.input[1]], held[node.input[2]].reshape(32, 2, 1)
            values = np.stack([packed & 0xF, packed >> 4], -1).reshape(32, 2, 16) - 8.0
            exact[name] = (values * scales).reshape(32, 32)
    ff.apply_onnx(source, {"a": bundle}, out, mode=mode)
    if mode == "unmerged":
        got = run(out, {"x": x})["y"]
    else:
        session = ff.AdapterSession(out)
        session.load("mine", bundle)
        got = session.run({"x": x}, adapter="mine")["y"]
    want, base = x.astype(np.float64), x.astype(np.float64)
    for name in LAYERS:
        want = want @ (exact[name] + exact_delta(bundle, name, (32, 32))).T
        base = base @ exact[name].T
    assert np.abs(want - base).max() > 0.1 * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
