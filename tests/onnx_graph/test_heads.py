"""Heads and biases of adapters on graphs whose own are quantised."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import fourierft_export as ff
from fourierft_export.errors import BaseMismatchError
from fourierft_export.onnx_graph.apply import apply_onnx

FORMS = ("dynamic int8", "QDQ", "4 bit")
Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]


class Classifier(nn.Module):
    """With a head on the first token (a Gemm, of two dimensions), or on each (a MatMul)."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.up, self.head, self.pooled = nn.Linear(32, 64), nn.Linear(64, 5), pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        return self.head(hidden[:, 0] if self.pooled else hidden)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 6, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=[True, False], ids=["pooled", "each token"])
def model(request: pytest.FixtureRequest) -> Classifier:
    torch.manual_seed(0)
    return Classifier(request.param).eval()


@pytest.fixture(scope="module")
def files(
    model: Classifier, x: np.ndarray, tools: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What onnxruntime's quantisers make of the model."""
    plain = tools.torchscript(model, x, tmp_path_factory.mktemp("heads") / "float.onnx")
    return {form: tools.quantise(plain, form, [{"x": x}]) for form in FORMS}


@pytest.fixture
def head() -> dict[str, np.ndarray]:
    """Far outside the ranges that were measured for the base's."""
    rng = np.random.default_rng(3)
    return {
        "head.weight": rng.standard_normal((5, 64)).astype(np.float32),
        "head.bias": 10 * rng.standard_normal(5).astype(np.float32),
    }


def hidden_of(path: Path, x: np.ndarray, pooled: bool, run: Run, tmp_path: Path) -> np.ndarray:
    """What the head gets, from the graph itself."""
    graph = onnx.load(path)
    (tanh,) = (node for node in graph.graph.node if node.op_type == "Tanh")
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(tanh.output[0], onnx.TensorProto.FLOAT, None)
    )
    onnx.save(graph, tmp_path / "hidden.onnx")
    hidden = run(tmp_path / "hidden.onnx", {"x": x})[tanh.output[0]].astype(np.float64)
    return hidden[:, 0] if pooled else hidden


@pytest.mark.parametrize(
    ("form", "mode"),
    [*itertools.product(FORMS, ["unmerged", "swappable", "bank"])],
)
def test_the_adapters_own_head_in_float(
    form: str,
    mode: str,
    files: dict[str, Path],
    model: Classifier,
    head: dict[str, np.ndarray],
    make_bundle: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    """The head's product to float32: nothing of it is quantised, nor clipped."""
    weights = {"up": model.up.weight.detach().numpy()}
    bundle = make_bundle(["up"], weights, head, n=40, scaling=150.0)
    out = tmp_path / "out.onnx"
    apply_onnx(files[form], {"a": bundle}, out, mode=mode)
    feeds = {"x": x} | ({"adapter_id": np.ones(len(x), np.int64)} if mode == "bank" else {})
    got = run(out, feeds)["y"]
    alone = tmp_path / "alone.onnx"
    apply_onnx(
        files[form], make_bundle(["up"], weights, n=40, scaling=150.0), alone, mode="unmerged"
    )
    hidden = hidden_of(alone, x, model.pooled, run, tmp_path)
    want = hidden @ head["head.weight"].T.astype(np.float64) + head["head.bias"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    if mode != "unmerged":  # the base, whose head was dequantised
        base, quantised = ff.AdapterSession(out).run({"x": x})["y"], run(files[form], {"x": x})["y"]
        np.testing.assert_allclose(base, quantised, rtol=0, atol=0.03 * np.abs(quantised).max())


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_beside_a_quantised_weight(
    form: str,
    files: dict[str, Path],
    model: Classifier,
    make_bundle: Any,
    tmp_path: Path,
) -> None:
    """It is in the output as it is in the bundle, also where the base's was quantised."""
    bias = np.random.default_rng(4).standard_normal(64).astype(np.float32)
    bundle = make_bundle(["up"], {"up": model.up.weight.detach().numpy()}, {"up.bias": bias})
    out = tmp_path / "out.onnx"
    apply_onnx(files[form], bundle, out, mode="unmerged")
    (there,) = (t for t in onnx.load(out).graph.initializer if t.name == "up.bias")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(there), bias)


def test_a_form_that_is_not_understood(
    files: dict[str, Path],
    model: Classifier,
    head: dict[str, np.ndarray],
    make_bundle: Any,
    tmp_path: Path,
) -> None:
    if model.pooled:
        pytest.skip("a Gemm, which this quantiser leaves alone")
    graph = onnx.load(files["4 bit"])
    (node,) = (n for n in graph.graph.node if n.op_type == "MatMulNBits" and "head" in n.name)
    order = np.zeros(64, np.int32)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(order, "order"))
    node.input.extend(["", "order"])
    onnx.save(graph, tmp_path / "in.onnx")
    bundle = make_bundle(["up"], {"up": model.up.weight.detach().numpy()}, head)
    with pytest.raises(BaseMismatchError, match="nodes_to_exclude") as caught:
        apply_onnx(tmp_path / "in.onnx", bundle, tmp_path / "out.onnx", mode="unmerged")
    assert len(caught.value.offenders) == 1
    assert "head.weight" in caught.value.offenders[0]
