"""Mode paired: the expander makes the weights, the graph runs with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import fourierft_export as ff
from fourierft_export.errors import BadInputError
from fourierft_export.onnx_graph.runtime.exported_file import parameters_for
from fourierft_export.spectral.delta import reference_delta


def feeds_of(tenants: Any, name: str) -> dict[str, np.ndarray]:
    """Everything an adapter feeds the two graphs together."""
    return parameters_for(tenants.file("paired"), tenants.bundles[name], both_graphs=True)


def swapped(tenants: Any, name: str, evaluate: Any) -> np.ndarray:
    """The output of one graph after the other, as any language would do it."""
    path = tenants.file("paired")
    feeds = feeds_of(tenants, name)
    spectral = {k: v for k, v in feeds.items() if k.startswith("fourierft.")}
    saved = {k: v for k, v in feeds.items() if k not in spectral}
    weights = evaluate(path.with_suffix(".expand.onnx"), spectral)
    return evaluate(path, {**tenants.inputs, **saved, **weights})[tenants.output]


def reference(path: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(str(path))
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


@pytest.mark.parametrize("name", ["one", "two"])
def test_in_two_runtimes(small_tenants: Any, name: str, run: Any) -> None:
    for evaluate in (run, reference):
        small_tenants.check(swapped(small_tenants, name, evaluate), name)


def test_the_expander_holds_the_base_and_gives_what_the_graph_takes(
    small_tenants: Any, run: Any
) -> None:
    path = small_tenants.file("paired")
    graph, expand = onnx.load(path).graph, onnx.load(path.with_suffix(".expand.onnx")).graph
    takes = {v.name: v.type.SerializeToString() for v in graph.input}
    gives = {v.name: v.type.SerializeToString() for v in expand.output}
    assert gives.keys() == {"a.weight", "b.weight", "c.weight"}
    assert all(takes[name] == kind for name, kind in gives.items())
    base = {t.name: numpy_helper.to_array(t) for t in expand.initializer}
    bundle = small_tenants.bundles["one"]
    for name, got in run(path.with_suffix(".expand.onnx"), {}).items():
        layer = bundle.layer(name.removesuffix(".weight"))
        delta = reference_delta(
            bundle.spectra[layer.name], bundle.entries(layer.name), layer.shape, bundle.spec.scaling
        )
        want = base[f"{name}.base"] + delta.T
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
        assert np.abs(delta).max() > 0.01


def test_the_graph_has_the_nodes_of_merged(small_tenants: Any) -> None:
    graphs = [onnx.load(small_tenants.file(mode)).graph for mode in ("paired", "merged")]
    paired, merged = ([node.op_type for node in graph.node] for graph in graphs)
    # A head that is fed is turned at every run.
    assert sorted(set(paired) - {"Transpose"}) == sorted(set(merged) - {"Transpose"})
    assert len(paired) - len(merged) in (0, 1)


MIXED = {
    "another default adapter": (7.0, "MatMul", 8),
    "another base": (7.5, "MatMul", 7),
    "the weight stored the other way": (7.0, "Gemm", 7),
}


@pytest.mark.parametrize("mixed", MIXED)
def test_the_expander_of_another_export(
    mixed: str, write_onnx: Any, make_bundle: Any, tmp_path: Path
) -> None:
    """Only one that computes the same weights from an adapter serves; any other is refused."""
    scale, operator, seed = MIXED[mixed]
    x = np.random.default_rng(0).standard_normal((3, 9)).astype(np.float32)

    def write(name: str, scale: float, operator: str, seed: int) -> tuple[Path, ff.Bundle]:
        weight = scale * np.arange(81, dtype=np.float32).reshape(9, 9) / 81
        plain = write_onnx(
            tmp_path / f"{name}-plain.onnx",
            [("MatMul", ["x", "w"], ["y"])]
            if operator == "MatMul"
            else [("Gemm", ["x", "w"], ["y"], {"transB": 1}.items())],
            {"w": weight.T if operator == "MatMul" else weight},
            {"x": [None, 9]},
            {"y": [None, 9]},
        )
        bundle = make_bundle(["w"], {"w": weight}, seed=seed)
        ff.apply_onnx(plain, bundle, tmp_path / f"{name}.onnx", mode="paired", mapping={"w": "w"})
        return tmp_path / f"{name}.onnx", bundle

    path, bundle = write("first", 7.0, "MatMul", 7)
    session = ff.AdapterSession(path)
    session.load("a", bundle)
    want = session.run({"x": x}, adapter="a")["y"]
    second, _ = write("second", scale, operator, seed)
    second.with_suffix(".expand.onnx").replace(path.with_suffix(".expand.onnx"))
    if mixed == "another default adapter":
        session = ff.AdapterSession(path)
        session.load("a", bundle)
        np.testing.assert_array_equal(session.run({"x": x}, adapter="a")["y"], want)
        return
    with pytest.raises(BadInputError, match=r"first\.expand\.onnx: expected the file"):
        ff.AdapterSession(path)
    with pytest.raises(BadInputError, match=r"first\.expand\.onnx: expected the file"):
        parameters_for(path, bundle)
