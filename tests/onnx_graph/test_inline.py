"""Versions, inlining and precision of the file: what other tools make of an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, version_converter
from onnx.reference import ReferenceEvaluator

import fourierft_export as ff
from fourierft_export.errors import UsageError
from fourierft_export.models.load import load_model
from fourierft_export.onnx_graph.trace.pretrained import export_pretrained

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def base(cut_stories: Callable[[int], Path]) -> Path:
    return cut_stories(1)


@pytest.fixture(scope="module")
def bundle(base: Path) -> ff.Bundle:
    torch.manual_seed(0)
    config = ff.FourierFTConfig(target_modules=["q_proj", "v_proj"], n_frequency=100, scaling=100.0)
    return ff.capture(ff.inject(load_model(base, "text-generation"), config))


@pytest.fixture(scope="module")
def inputs(stories_tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": stories_tokens, "attention_mask": np.ones_like(stories_tokens)}


@pytest.fixture(scope="module")
def weak(bundle: ff.Bundle) -> ff.Bundle:
    """The adapter at a scaling at which float16 is precise enough for this model."""
    return replace(bundle, spec=replace(bundle.spec, scaling=30.0))


def logits(base: Path, bundle: ff.Bundle, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """PyTorch's, in float64."""
    model = ff.attach(load_model(base, "text-generation"), bundle).double()
    with torch.no_grad():
        found = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits
    return np.asarray(found.numpy())


@pytest.fixture(scope="module")
def want(base: Path, bundle: ff.Bundle, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return logits(base, bundle, inputs)


@pytest.fixture(scope="module")
def inlined(base: Path, bundle: ff.Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inline") / "model.onnx"
    report = export_pretrained(base, bundle, path, mode="unmerged", inline=True)
    assert report.nodes == len(onnx.load(path).graph.node)
    return path


def agree(got: np.ndarray, want: np.ndarray, scale: float = 1e-4) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=scale * np.abs(want).max())
    if scale <= 1e-4:
        np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


def run_proto(model: onnx.ModelProto, inputs: dict[str, Any], run: Run, folder: Path) -> np.ndarray:
    onnx.save(model, folder / "changed.onnx")
    return run(folder / "changed.onnx", inputs)["logits"]


def test_inlined_graphs_hold_standard_operators_only(
    inlined: Path, inputs: dict[str, Any], want: np.ndarray, run: Run
) -> None:
    model = onnx.load(inlined)
    assert not model.functions
    assert [opset.domain for opset in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    names = {tensor.name for tensor in model.graph.initializer}
    assert {f"model.layers.0.self_attn.{x}_proj.spectrum" for x in "qv"} <= names
    agree(run(inlined, inputs)["logits"], want)
    agree(ReferenceEvaluator(model).run(["logits"], inputs)[0], want)


def test_the_float16_converter_takes_inlined_graphs(
    base: Path, weak: ff.Bundle, inputs: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = tmp_path / "model.onnx"
    export_pretrained(base, weak, path, mode="unmerged", inline=True)
    half = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    assert any(t.data_type == TensorProto.FLOAT16 for t in half.graph.initializer)
    agree(run_proto(half, inputs, run, tmp_path), logits(base, weak, inputs), scale=1e-2)


def test_the_version_converter_takes_inlined_graphs(
    inlined: Path, inputs: dict[str, Any], want: np.ndarray, run: Run, tmp_path: Path
) -> None:
    newer = version_converter.convert_version(onnx.load(inlined), 23)
    assert [opset.version for opset in newer.opset_import] == [23]
    agree(run_proto(newer, inputs, run, tmp_path), want)


@pytest.mark.parametrize("inline", [False, True])
def test_nothing_wide_is_left_once_the_graph_is_loaded(
    inline: bool, inlined: Path, base: Path, bundle: ff.Bundle, tmp_path: Path, folded: Any
) -> None:
    path = inlined
    if not inline:
        path = tmp_path / "model.onnx"
        export_pretrained(base, bundle, path, mode="unmerged")
    graph = onnx.shape_inference.infer_shapes(folded(path)).graph
    floats = (TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    assert not [t.name for t in graph.initializer if t.data_type in floats]
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    assert not [name for name, kind in types.items() if kind in floats]
    # Integers are positions and sizes: no matrix of them is multiplied.
    products = [
        name for node in graph.node if node.op_type in ("MatMul", "Gemm") for name in node.output
    ]
    assert products
    assert {types.get(name, TensorProto.FLOAT) for name in products} == {TensorProto.FLOAT}
    assert not [
        t.name for t in graph.initializer if t.data_type == TensorProto.INT64 and len(t.dims) > 1
    ]


@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (25, None)])
def test_versions_are_those_asked_for(
    opset: int,
    ir_version: int | None,
    base: Path,
    bundle: ff.Bundle,
    inputs: dict[str, Any],
    want: np.ndarray,
    run: Run,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.onnx"
    report = export_pretrained(
        base, bundle, path, mode="unmerged", opset=opset, ir_version=ir_version
    )
    model = onnx.load(path)
    assert report.opset == opset
    assert {o.domain: o.version for o in model.opset_import}[""] == opset
    assert {o.version for f in model.functions for o in f.opset_import if not o.domain} == {opset}
    # onnx's own table: opset 25 came with IR version 13.
    assert model.ir_version == {18: 8, 25: 13}[opset]
    agree(run(path, inputs)["logits"], want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 17}, "opset: expected 18 to 25, found 17"),
        ({"opset": 26}, "opset: expected 18 to 25, found 26"),
        ({"ir_version": 7}, "ir_version: expected 8 to"),
        ({"ir_version": 99}, "ir_version: expected 8 to"),
        ({"opset": 23, "ir_version": 10}, "ir_version: expected 11 to"),
    ],
)
def test_versions_that_cannot_be(
    options: dict[str, int], words: str, base: Path, bundle: ff.Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        export_pretrained(base, bundle, tmp_path / "m.onnx", mode="unmerged", **options)
    assert list(tmp_path.iterdir()) == []
