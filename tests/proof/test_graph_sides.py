"""ONNX files as sides: any module's graph, half precision, fixed sizes, faulty exports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fourierft_export as ff
from fourierft_export.bundle.spec import LayerSpec
from fourierft_export.errors import BadInputError, UsageError
from fourierft_export.proof.graphs import Graph


def test_any_torch_module_against_a_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, adapted = (
        torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).eval()
        for _ in range(2)
    )
    path = tmp_path / "adapted.onnx"
    weights = {name: value.numpy() for name, value in adapted.state_dict().items()}
    nodes = [
        helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["h"], transB=1),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Gemm", ["t", "2.weight", "2.bias"], ["y"], transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 6), ("y", 4))
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)

    def side(module: torch.nn.Module) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        return lambda inputs: {"y": module(torch.from_numpy(inputs["x"])).detach().numpy()}

    inputs = {"x": np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)}
    sides = {"base": side(base), "torch": side(adapted)}
    report = ff.validate(sides=sides, onnx=[path], inputs=inputs)
    report.raise_for_failure()
    assert [(p.left, p.right, p.expect) for p in report.comparisons] == [
        ("torch", "onnx:adapted.onnx", "equal"),
        ("base", "torch", "different"),
        ("base", "onnx:adapted.onnx", "different"),
    ]
    swapped = ff.validate(
        sides={"base": side(adapted), "torch": side(base)}, onnx=[path], inputs=inputs
    )
    assert not swapped.ok


def test_a_half_precision_graph(classifier: Any, clean_onnx: Path, plant_onnx: Any) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for source, good in ((clean_onnx, True), (plant_onnx("seed + 1"), False)):
        half = source.with_name(f"half_{good}.onnx")
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), half)
        report = ff.validate(base=classifier.base, bundle=classifier.bundle, onnx=half)
        assert report.sides[-1].precision == "float16"
        assert report.ok is good
        pair = next(p for p in report.comparisons if p.right == f"onnx:{half.name}")
        assert pair.precision == "float16"


def test_quantised_weights_are_named_as_the_cause(
    classifier: Any, clean_onnx: Path, tmp_path: Path
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(clean_onnx)
    del model.graph.value_info[:]  # the exporter's do not fit onnx's own inference
    onnx.save(model, tmp_path / "plain.onnx")
    quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "int8.onnx")
    limits = {"int8": 1e-9}
    options = {"base": classifier.base, "bundle": classifier.bundle, "tolerances": limits}
    report = ff.validate(**options, onnx=tmp_path / "int8.onnx")
    (cause,) = report.causes
    assert cause.kind == "precision" and "session.x64quantprecision" in cause.text


def test_an_adapter_that_was_quantised_with_the_base(classifier: Any, tmp_path: Path) -> None:
    """Found however small the difference is; not where the adapter's nodes were left out."""
    from onnxruntime.quantization import quantize_dynamic

    path, out = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    ff.export_pretrained(classifier.base, classifier.bundle, path, mode="swappable")
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    listed = json.loads(metadata["fourierft_export"])["nodes"]
    options = {"base": classifier.base, "bundle": classifier.bundle, "samples": 8}
    some = [name for name in listed if not name.endswith(".transform")]
    for nodes in (listed, some, []):
        quantize_dynamic(path, out, nodes_to_exclude=nodes)
        names = {node.name.replace("_MatMul", "") for node in onnx.load(out).graph.node}
        assert names.isdisjoint(f"{name}_quant" for name in listed) is (nodes == listed)
        try:
            problems = ff.validate(**options, onnx=out).problems
        except BadInputError as error:  # ONNX Runtime itself does not load some of these
            problems = (error.remedy,)
        assert ["nodes_to_exclude" in text for text in problems] == [True] * (nodes != listed)


@pytest.mark.parametrize("mode", ["unmerged", "swappable"])
def test_a_graph_of_a_faulty_bundle(classifier: Any, tmp_path: Path, mode: str) -> None:
    bundle = classifier.bundle
    # Unbound, so that nothing else shows the fault.
    layers = tuple(LayerSpec(layer.name, layer.n_frequency) for layer in bundle.layers)
    spec = replace(bundle.spec, layers=layers, scaling=bundle.spec.scaling * 1.01)
    path = tmp_path / "model.onnx"
    faulty = ff.Bundle.build(spec, bundle.spectra, bundle.saved)
    ff.export_pretrained(classifier.base, faulty, path, mode=mode)
    report = ff.validate(base=classifier.base, bundle=bundle, onnx=path)
    assert [(p.left, p.right) for p in report.failing] == [("torch", "onnx:model.onnx")]
    (cause,) = report.causes
    assert (cause.kind, cause.layer) == ("scaling", layers[0].name), str(cause)


def test_a_graph_of_fixed_size_gets_inputs_of_that_size(
    classifier: Any, clean_onnx: Path, tmp_path: Path
) -> None:

    model = onnx.load(clean_onnx)
    for value in model.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, (4, 24), strict=True):
            axis.dim_value = size
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    report = ff.validate(base=classifier.base, bundle=classifier.bundle, onnx=path, samples=8)
    report.raise_for_failure()
    assert dict(report.input_shapes)["input_ids"] == (8, 24)
    with pytest.raises(UsageError, match="a number of rows that 4 divides"):
        ff.validate(base=classifier.base, bundle=classifier.bundle, onnx=path, samples=7)


def test_a_graph_with_an_output_for_the_whole_batch(tmp_path: Path) -> None:
    """Rows are run in batches only where every output has a row per example."""

    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["n", "t"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "t"])
    outputs = [helper.make_tensor_value_info(n, TensorProto.INT64, None) for n in ("sum", "rows")]
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["rows"]),
        helper.make_node("ReduceSum", ["rows"], ["sum"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "g", [ids, mask], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "sum.onnx")
    inputs = {
        "input_ids": np.arange(40).reshape(10, 4),
        "attention_mask": np.ones((10, 4), np.int64),
    }

    def expected(given: Mapping[str, Any]) -> dict[str, Any]:
        return {"rows": given["input_ids"], "sum": np.int64(780)}

    report = ff.validate(
        sides={"numpy": expected}, onnx=tmp_path / "sum.onnx", inputs=inputs, batch_size=3
    )
    report.raise_for_failure()
    floats = inputs | {"input_ids": np.ones((10, 4))}
    with pytest.raises(UsageError, match="input input_ids: expected int64"):
        ff.validate(sides={"numpy": expected}, onnx=tmp_path / "sum.onnx", inputs=floats)


def test_a_graph_that_mixes_rows_is_found_by_running_one_alone(tmp_path: Path) -> None:
    """Dynamic quantisation and a wrong reduction do that; in one batch all sides agree."""
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", "t"]) for n in ("x", "y")]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["n", "t"])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=1),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "m"], ["z"]),
        helper.make_node("Div", ["z", "most"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [io[0], mask], io[1:])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "m.onnx")
    inputs = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    inputs["attention_mask"] = np.array([[1, 1, 0, 0], [1] * 4, [1] * 4])

    def expected(given: Mapping[str, Any]) -> dict[str, Any]:
        return {"y": given["x"] * given["attention_mask"] / np.float32(11)}

    report = ff.validate(sides={"numpy": expected}, onnx=tmp_path / "m.onnx", inputs=inputs)
    assert not report.failing
    (problem,) = report.problems
    assert problem.startswith("onnx:m.onnx: row 0 alone differs from itself in the batch")


def test_a_lack_of_memory_is_no_bad_input(tmp_path: Path) -> None:
    node = helper.make_node("ConstantOfShape", ["n"], ["y"])
    size = helper.make_tensor_value_info("n", TensorProto.INT64, [1])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "g", [size], [output]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(MemoryError, match="Failed to allocate memory"):
        Graph(tmp_path / "model.onnx").run({"n": np.array([2**50])})


def test_external_data_behind_a_link_is_not_opened(tmp_path: Path) -> None:
    """ONNX Runtime itself would follow it."""
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.onnx"
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", io[:1], io[1:], [weight])
    onnx.save_model(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    data = folder / "model.onnx.data"
    assert Graph(path).precision == "float32"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInputError, match="a link to"):
        Graph(path)
