"""What base a graph says it has, after `apply` of an adapter that was trained on another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourierft_export as ff
from fourierft_export.bundle.fingerprint import fingerprint
from fourierft_export.errors import BaseMismatchError
from fourierft_export.onnx_graph.apply import apply_onnx

WEIGHT = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)


@pytest.fixture
def plain(tmp_path: Path, write_onnx: Any) -> Any:
    """x W^T, with W stored as (in, out)."""
    node, x, y = ("MatMul", ["x", "up.weight"], ["y"]), ["batch", 32], ["batch", 16]
    return write_onnx(tmp_path / "plain.onnx", [node], {"up.weight": WEIGHT.T}, {"x": x}, {"y": y})


def accepts(path: Path, bundle: Any) -> bool:
    try:
        ff.AdapterSession(path).load("a", bundle)
    except BaseMismatchError:
        return False
    return True


def in_out(bundle: Any, weight: np.ndarray) -> Any:
    """The bundle of a base that stores its weight as (in, out)."""
    (layer,) = bundle.layers
    mark = fingerprint(np.ascontiguousarray(weight.T))
    layer = replace(layer, fan_in_fan_out=True, fingerprint=mark)
    return replace(bundle, spec=replace(bundle.spec, layers=(layer,)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mode", ["swappable", "paired", "bank"])
def test_the_graphs_own(
    mode: str, turned: bool, plain: Path, make_bundle: Any, tmp_path: Path
) -> None:
    """The right adapter loads, the wrong one does not, whichever came first."""
    right, wrong = (make_bundle(["up"], {"up": weight}) for weight in (WEIGHT, WEIGHT + 1))
    if turned:
        right, wrong = in_out(right, WEIGHT), in_out(wrong, WEIGHT + 1)
    for i, bundle in enumerate((right, wrong)):
        out = tmp_path / f"{i}.onnx"
        apply_onnx(plain, {"a": bundle}, out, mode=mode, allow_base_mismatch=True)
        assert accepts(out, right)
        assert not accepts(out, wrong)


def test_of_several_adapters_the_one_that_is_right(
    plain: Path, make_bundle: Any, tmp_path: Path
) -> None:
    right, wrong = (make_bundle(["up"], {"up": weight}) for weight in (WEIGHT, WEIGHT + 1))
    for i, bundles in enumerate(({"a": right, "b": wrong}, {"b": wrong, "a": right})):
        out = tmp_path / f"{i}.onnx"
        apply_onnx(plain, bundles, out, mode="bank", allow_base_mismatch=True)
        assert accepts(out, right)
        assert not accepts(out, wrong)


def test_another_precision_stays_the_adapters(
    plain: Path, make_bundle: Any, tmp_path: Path
) -> None:
    """An adapter of the float16 base loads into a float32 graph of the same weights."""
    half = make_bundle(["up"], {"up": WEIGHT.astype(np.float16)})
    apply_onnx(plain, half, tmp_path / "out.onnx", mode="swappable")
    assert accepts(tmp_path / "out.onnx", half)
    assert not accepts(tmp_path / "out.onnx", make_bundle(["up"], {"up": WEIGHT + 1}))


def test_a_quantised_weight_is_not_vouched_for(
    plain: Path, make_bundle: Any, tmp_path: Path
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantised, out = tmp_path / "quantised.onnx", tmp_path / "out.onnx"
    quantize_dynamic(plain, quantised, weight_type=QuantType.QInt8)
    right, wrong = (make_bundle(["up"], {"up": weight}) for weight in (WEIGHT, WEIGHT + 1))
    apply_onnx(quantised, wrong, out, mode="swappable", allow_base_mismatch=True)
    assert accepts(out, right)
    apply_onnx(quantised, right, tmp_path / "right.onnx", mode="swappable")
    assert accepts(tmp_path / "right.onnx", right)
    assert not accepts(tmp_path / "right.onnx", wrong)
