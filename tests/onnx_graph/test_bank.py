"""Mode bank: rows of one batch with different adapters equal each row on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import fourierft_export as ff
from fourierft_export.errors import UsageError
from fourierft_export.onnx_graph.graph.shapes import fill_shapes
from fourierft_export.onnx_graph.graph.source import open_onnx
from fourierft_export.onnx_graph.modes.batch_dimension import is_batch_first, leads_with_batch

NAMES = (None, "one", "two")


@pytest.mark.parametrize("evaluator", ["ort", "reference"])
def test_mixed_rows_equal_each_row_alone(small_tenants: Any, run: Any, evaluator: str) -> None:
    path = small_tenants.file("bank")
    ids = np.array([2, 0, 1, 2, 1])
    feeds = {**small_tenants.inputs, "adapter_id": ids}
    if evaluator == "ort":
        got = run(path, feeds)["output"]
        for row in range(len(ids)):
            one = {
                "x": small_tenants.inputs["x"][row : row + 1],
                "adapter_id": ids[row : row + 1],
            }
            alone = run(path, one)["output"]
            np.testing.assert_allclose(got[row], alone[0], atol=1e-6 * np.abs(got).max())
    else:
        got = ReferenceEvaluator(str(path)).run(None, feeds)[0]
    for row, number in enumerate(ids):
        small_tenants.check(got[row], NAMES[number], rows=row)


def test_what_has_no_rows_is_refused(tmp_path: Path) -> None:
    class Positions(nn.Module):
        """A layer that works on something without a batch."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(self.table * x.mean())

    class Bent(nn.Module):
        """A saved tensor in an operator that has one for the whole batch."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bend = nn.Linear(8, 8), nn.Conv1d(5, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bend(self.layer(x))

    for model, saved, match in ((Positions(), None, "the batch"), (Bent(), ["bend"], "Conv")):
        config = ff.FourierFTConfig(n_frequency=9, target_modules=["layer"], modules_to_save=saved)
        ff.inject(model.eval(), config)
        with pytest.raises(UsageError) as caught:
            ff.export_onnx(
                model,
                {"x": torch.randn(3, 5, 8)},
                tmp_path / "m.onnx",
                mode="bank",
                dynamic_shapes={"x": {0: "batch"}},
            )
        assert match in f"{caught.value} {caught.value.offenders}"
    assert list(tmp_path.iterdir()) == []


def test_layer_norms_and_all_biases_per_row(tmp_path: Path, run: Any, tools: Any) -> None:
    """Saved layer norms, with scale and bias, and the biases of every layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.LayerNorm(6))
    x = torch.randn(4, 3, 8)
    configs = {
        name: ff.FourierFTConfig(
            n_frequency=9,
            random_loc_seed=seed,
            scaling=20.0,
            target_modules=["0", "2"],
            modules_to_save=["1"],
            bias="all",
        )
        for seed, name in enumerate(NAMES)
        if name
    }
    bundles, want = tools.random_adapters(model.eval(), x, configs)
    for name, bundle in bundles.items():
        ff.attach(model, bundle, name)
    path = tmp_path / "bank.onnx"
    ff.export_onnx(model, (x,), path, mode="bank", dynamic_shapes={"input": {0: "b", 1: "t"}})
    ids = np.array([2, 1, 0, 2])
    got = run(path, {"input": x.numpy(), "adapter_id": ids})["output"]
    for row, number in enumerate(ids):
        np.testing.assert_allclose(got[row], want[NAMES[number]][row], atol=1e-5)
        assert np.abs(want["one"][row] - want["two"][row]).max() > 0.1


def test_validate_runs_the_first_adapter(small_tenants: Any) -> None:
    from fourierft_export.proof.graphs import Graph

    got = Graph(small_tenants.file("bank")).run(small_tenants.inputs)["output"]
    small_tenants.check(got, "one")


class Flat(nn.Module):
    """A layer on tokens in one long list: those of each row together, or those of each place."""

    def __init__(self, by_place: bool) -> None:
        super().__init__()
        self.by_place, self.layer, self.head = by_place, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_place:
            x = x.transpose(0, 1)
        y = torch.tanh(self.layer(torch.relu(x.reshape(-1, 8)))).reshape(x.shape)
        return self.head(y.mean(0 if self.by_place else 1))


@pytest.fixture
def flat(tools: Any) -> Any:
    """`flat(by_place)`: model, two bundles with heads, an input, and what each adapter gives."""

    def make(by_place: bool) -> Any:
        torch.manual_seed(0)
        model, x = Flat(by_place).eval(), torch.randn(4, 6, 8)
        configs = {
            name: ff.FourierFTConfig(
                n_frequency=30,
                scaling=60.0,
                random_loc_seed=seed,
                target_modules=["layer"],
                modules_to_save=["head"],
            )
            for seed, name in enumerate(NAMES)
            if name
        }
        bundles, want = tools.random_adapters(model, x, configs)
        return model, bundles, x, want

    return make


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("by_place", [True, False])
def test_flattened_tokens_are_of_their_row_or_refused(
    flat: Any, by_place: bool, dynamic: bool, tmp_path: Path, run: Any
) -> None:
    """Tokens times batch is as large as batch times tokens: only the latter can have rows."""
    model, bundles, x, want = flat(by_place)
    for name, bundle in bundles.items():
        ff.attach(model, bundle, name)
    axes = {"x": {0: "batch", 1: "tokens"}} if dynamic else None
    path = tmp_path / "bank.onnx"
    if by_place:
        with pytest.raises(UsageError, match=r"the batch .* first") as caught:
            ff.export_onnx(model, {"x": x}, path, mode="bank", dynamic_shapes=axes)
        assert caught.value.offenders[0].startswith("layer: input")
        return
    ff.export_onnx(model, {"x": x}, path, mode="bank", dynamic_shapes=axes)
    names = ["one", None, "two", "one"]
    ids = np.array([1, 0, 2, 1])
    got = run(path, {"x": x.numpy(), "adapter_id": ids})["output"]
    for row, name in enumerate(names):
        np.testing.assert_allclose(got[row], want[name][row], atol=1e-4)


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("by_place", [True, False])
def test_files_that_tell_no_shapes(
    flat: Any, by_place: bool, stripped: bool, tmp_path: Path, run: Any, tools: Any
) -> None:
    """TorchScript's exporter leaves the shapes in between out, some tools even the batch's name."""
    model, bundles, x, want = flat(by_place)
    plain, path = tmp_path / "plain.onnx", tmp_path / "bank.onnx"
    tools.torchscript(model, x.numpy(), plain, axes={0: "batch", 1: "tokens"})
    proto = onnx.load(plain)
    del proto.graph.value_info[:]
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "y_dim_0"  # as for logits
    if stripped:
        for value in (proto.graph.input[0], proto.graph.output[0]):
            value.type.tensor_type.shape.dim[0].Clear()
    onnx.save(proto, plain)
    if by_place:
        with pytest.raises(UsageError, match=r"the batch .* first"):
            ff.apply_onnx(plain, bundles, path, mode="bank")
        return
    ff.apply_onnx(plain, bundles, path, mode="bank")
    got = run(path, {"x": x.numpy(), "adapter_id": np.array([1, 0, 2, 1])})["y"]
    for row, name in enumerate(["one", None, "two", "one"]):
        np.testing.assert_allclose(got[row], want[name][row], atol=1e-4)
    assert np.abs(want["one"] - want["two"]).max() > 1


@pytest.mark.parametrize("field", [{"alpha": 2.0}, {"beta": 0.5}])
def test_heads_in_a_gemm_that_does_more_are_refused(
    field: Any, flat: Any, tmp_path: Path, write_onnx: Any
) -> None:
    _, bundles, _, _ = flat(False)
    rng = np.random.default_rng(0)
    shapes = {"layer.weight": (8, 8), "head.weight": (3, 8), "head.bias": (3,)}
    nodes = [
        ("Gemm", ["x", "layer.weight"], ["t"], {"transB": 1}),
        ("Gemm", ["t", "head.weight", "head.bias"], ["y"], {"transB": 1} | field),
    ]
    weights = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    plain = tmp_path / "plain.onnx"
    write_onnx(plain, nodes, weights, {"x": ["batch", 8]}, {"y": ["batch", 3]})
    with pytest.raises(UsageError, match="saved tensors of linear layers") as caught:
        ff.apply_onnx(plain, bundles, tmp_path / "bank.onnx", mode="bank", allow_base_mismatch=True)
    assert any("Gemm" in offender for offender in caught.value.offenders)
    assert not (tmp_path / "bank.onnx").exists()


def test_position_ids_leave_the_batch_where_it_is(tmp_path: Path, write_onnx: Any) -> None:
    """TorchScript slices a constant up to the number of tokens; inference then knows no size."""
    constants = {"start": [0], "axis": [1], "all": np.zeros((1, 9, 8), np.float32)}
    nodes = [
        ("Shape", ["x"], ["stop"], {"start": 1, "end": 2}),
        ("Slice", ["all", "start", "stop", "axis"], ["places"]),
        ("Add", ["x", "places"], ["y"]),
    ]
    x = {"x": ["batch", "tokens", 8]}
    model = open_onnx(write_onnx(tmp_path / "m.onnx", nodes, constants, x, {"y": None})).model
    fill_shapes(model)
    slice_, add = model.graph[1].outputs[0], model.graph[2].outputs[0]
    assert is_batch_first(add, "batch")
    assert not leads_with_batch(slice_, "batch")


def test_rows_of_a_table_in_the_order_of_ids(
    tmp_path: Path, write_onnx: Any, make_bundle: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As optimum writes GPT-2: ids reshaped by sizes of their own; and where sympy is missing."""
    from fourierft_export.onnx_graph.graph import shapes

    monkeypatch.setattr(shapes, "_infer_with_onnxruntime", lambda model: (False, {}))
    rng = np.random.default_rng(0)
    constants = {"table": rng.standard_normal((9, 8)).astype(np.float32), "flat": [-1, 8]}
    constants |= {"minus": [-1], "lin.weight": rng.standard_normal((8, 5)).astype(np.float32)}
    nodes = [
        ("Cast", ["x"], ["ids"], {"to": onnx.TensorProto.INT64}),
        ("Shape", ["ids"], ["tokens"], {"start": 1}),
        ("Concat", ["minus", "tokens"], ["sizes"], {"axis": 0}),
        ("Reshape", ["ids", "sizes"], ["view"]),
        ("Gather", ["table", "view"], ["embedded"]),
        ("Reshape", ["embedded", "flat"], ["rows"]),
        ("MatMul", ["rows", "lin.weight"], ["y"], {"name": "/lin/MatMul"}),
    ]
    plain, bank = tmp_path / "plain.onnx", tmp_path / "bank.onnx"
    write_onnx(plain, nodes, constants, {"x": ["batch", "tokens"]}, {"y": None})
    weight = np.ascontiguousarray(constants["lin.weight"].T)
    bundles = {name: make_bundle(["lin"], {"lin": weight}, seed=i) for i, name in enumerate("ab")}
    ff.apply_onnx(plain, bundles, bank, mode="bank")
    x = rng.integers(0, 9, (3, 4)).astype(np.float32)
    got = run(bank, {"x": x, "adapter_id": np.array([2, 0, 1])})["y"].reshape(3, 4, 5)
    for row, name in enumerate(("b", None, "a")):
        path = plain
        if name:
            path = tmp_path / f"{name}.onnx"
            ff.apply_onnx(plain, bundles[name], path)
        want = run(path, {"x": x})["y"].reshape(3, 4, 5)[row]
        np.testing.assert_allclose(got[row], want, rtol=0, atol=1e-5)
