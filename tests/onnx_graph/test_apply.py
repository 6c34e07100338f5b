"""Bundles into ONNX files that exist already, against W + delta_W computed in float64."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fourierft_export.errors import BadInputError, BaseMismatchError, UsageError
from fourierft_export.onnx_graph.apply import apply_onnx

MODES = ("merged", "unmerged")
EXPORTERS = ("torchscript", "dynamo", "dynamo-unoptimised")

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8, bias=False)
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ff(self.q(x) + self.k(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


LAYERS = ["blocks.0.q", "blocks.1.k", "blocks.0.ff.0", "blocks.1.ff.2", "head"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def exports(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model by every exporter."""
    folder = tmp_path_factory.mktemp("exports")
    options: dict[str, dict[str, Any]] = {
        "torchscript": {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}}},
        "dynamo": {"dynamo": True, "dynamic_shapes": {"x": {0: "batch"}}},
        "dynamo-unoptimised": {"dynamo": True, "optimize": False},
    }
    for name, fields in options.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (torch.zeros(2, 5, 8),),
                folder / f"{name}.onnx",
                input_names=["x"],
                output_names=["y"],
                verbose=False,
                external_data=False,
                **fields,
            )
    return {name: folder / f"{name}.onnx" for name in options}


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: model.get_submodule(name).weight.detach().numpy() for name in LAYERS}


def exact(model: nn.Module, bundle: Any, delta: Any, x: np.ndarray) -> np.ndarray:
    """The model with W + delta_W, all in float64."""
    changed = copy.deepcopy(model).double()
    for name in bundle.spectra:
        weight = changed.get_submodule(name).weight
        weight.data += torch.from_numpy(delta(bundle, name, tuple(weight.shape)))
    for name, value in bundle.saved.items():
        changed.get_parameter(name).data = torch.tensor(value).double()
    return changed(torch.from_numpy(x).double()).detach().numpy()


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_every_exporters_file(
    exporter: str,
    mode: str,
    exports: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    exact_delta: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
    node_list: Any,
) -> None:
    bundle = make_bundle(LAYERS)
    out = tmp_path / "out.onnx"
    report = apply_onnx(exports[exporter], bundle, out, mode=mode)
    got, base = (run(path, {"x": x})["y"] for path in (out, exports[exporter]))
    np.testing.assert_allclose(got, exact(model, bundle, exact_delta, x), rtol=0, atol=1e-6)
    assert np.abs(got - base).max() > 0.1
    assert set(report.layers) == set(LAYERS)
    assert any("no check was possible" in note for note in report.notes)
    if mode == "merged":
        assert node_list(onnx.load(out)) == node_list(onnx.load(exports[exporter]))


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_heads_and_biases_go_in(
    exporter: str,
    exports: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    exact_delta: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    rng = np.random.default_rng(3)
    saved = {
        "head.weight": rng.standard_normal((3, 8)).astype(np.float32),
        "head.bias": rng.standard_normal(3).astype(np.float32),
        "blocks.1.q.weight": rng.standard_normal((8, 8)).astype(np.float32),
        "blocks.1.ff.2.bias": rng.standard_normal(8).astype(np.float32),
    }
    bundle = make_bundle(["blocks.0.q"], weights_of(model), saved)
    out = tmp_path / "out.onnx"
    report = apply_onnx(exports[exporter], bundle, out)
    got = run(out, {"x": x})["y"]
    np.testing.assert_allclose(got, exact(model, bundle, exact_delta, x), rtol=0, atol=1e-5)
    assert report.notes == ()
    absent = make_bundle(["blocks.0.q"], saved={"classifier.weight": np.ones((2, 8), np.float32)})
    with pytest.raises(BaseMismatchError, match="head") as caught:
        apply_onnx(exports[exporter], absent, tmp_path / "absent.onnx")
    assert "classifier.weight: no such tensor in the graph" in caught.value.offenders
    other = make_bundle(["blocks.0.q"], saved={"head.weight": np.ones((2, 8), np.float32)})
    with pytest.raises(BaseMismatchError, match="head") as caught:
        apply_onnx(exports[exporter], other, tmp_path / "other.onnx")
    assert "shape [2, 8] expected" in caught.value.offenders[0]
    assert not (tmp_path / "other.onnx").exists()


def test_several_bundles_with_weights_add_up(
    exports: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    exact_delta: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    one, two = make_bundle(LAYERS[:3]), make_bundle(LAYERS[1:4], seed=11, n=20)
    changed = copy.deepcopy(model).double()
    for bundle, factor in ((one, 0.5), (two, -2.0)):
        for name in bundle.spectra:
            weight = changed.get_submodule(name).weight
            weight.data += factor * torch.from_numpy(exact_delta(bundle, name, weight.shape))
    want = changed(torch.from_numpy(x).double()).detach().numpy()
    for mode in MODES:
        out = tmp_path / f"{mode}.onnx"
        apply_onnx(exports["dynamo"], {"a": one, "b": two}, out, mode=mode, weights=[0.5, -2.0])
        np.testing.assert_allclose(run(out, {"x": x})["y"], want, rtol=0, atol=2e-6)
        text = {p.key: p.value for p in onnx.load(out).metadata_props}["fourierft_export"]
        assert [a["scaling"] for a in json.loads(text)["adapters"].values()] == [4.5, -18.0]


def test_prefixes_are_bridged(
    exports: dict[str, Path], make_bundle: Any, tmp_path: Path, run: Run, x: np.ndarray
) -> None:
    plain, prefixed = make_bundle(LAYERS), make_bundle([f"encoder.{name}" for name in LAYERS])
    outputs = []
    for bundle in (plain, prefixed):
        out = tmp_path / f"{len(outputs)}.onnx"
        apply_onnx(exports["torchscript"], bundle, out)
        outputs.append(run(out, {"x": x})["y"])
    np.testing.assert_array_equal(*outputs)


def test_another_base_is_refused_by_content_not_by_shape(
    exports: dict[str, Path], model: nn.Module, make_bundle: Any, tmp_path: Path
) -> None:
    weights = weights_of(model)
    weights["blocks.0.q"] = weights["blocks.0.q"] + np.float32(0.5)
    out = tmp_path / "out.onnx"
    bundle = make_bundle(LAYERS, weights)
    with pytest.raises(BaseMismatchError, match="allow-base-mismatch") as caught:
        apply_onnx(exports["dynamo"], bundle, out)
    assert len(caught.value.offenders) == 1
    why = "another weight than the adapter was trained on (val_"
    assert caught.value.offenders[0].startswith(f"blocks.0.q: {why}")
    assert not out.exists()
    report = apply_onnx(exports["dynamo"], bundle, out, allow_base_mismatch=True)
    assert any("base mismatches are allowed" in note for note in report.notes)
    shapes = weights_of(model) | {"head": np.zeros((4, 8), np.float32)}
    with pytest.raises(BaseMismatchError) as caught:
        apply_onnx(
            exports["dynamo"],
            make_bundle(LAYERS, shapes),
            tmp_path / "shape.onnx",
            allow_base_mismatch=True,
        )
    assert caught.value.offenders[0].startswith("head: shape [4, 8] expected")


def test_mistakes_leave_nothing(exports: dict[str, Path], make_bundle: Any, tmp_path: Path) -> None:
    out, bundle, source = tmp_path / "out.onnx", make_bundle(LAYERS), exports["dynamo"]
    with pytest.raises(UsageError, match="melted"):
        apply_onnx(source, bundle, out, mode="melted")
    with pytest.raises(UsageError, match="mapping"):
        apply_onnx(source, bundle, out, mapping={"no.such": "val_0"})
    with pytest.raises(BaseMismatchError) as caught:
        apply_onnx(source, bundle, out, mapping={"head": "no_such"})
    assert "head: --map names no_such" in caught.value.offenders[0]
    with pytest.raises(UsageError, match="at least one"):
        apply_onnx(source, [], out)
    with pytest.raises(UsageError, match="apart from the inputs"):
        apply_onnx(source, bundle, source, force=True)
    with pytest.raises(BaseMismatchError) as caught:
        apply_onnx(source, make_bundle(["head"], n=25), out)
    assert "n_frequency 25 above the size of [3, 8]" in caught.value.offenders[0]
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(BadInputError, match="an ONNX model"):
        apply_onnx(tmp_path / "text.onnx", bundle, out)
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(BadInputError, match="an ONNX model"):
        apply_onnx(tmp_path / "empty.onnx", bundle, out)
    apply_onnx(source, bundle, out, mode="unmerged")
    with pytest.raises(UsageError, match="without unmerged adapters"):
        apply_onnx(out, bundle, tmp_path / "twice.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.onnx", "out.onnx", "text.onnx"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_16_bit_weights(
    mode: str,
    dtype: str,
    make_bundle: Any,
    exact_delta: Any,
    tmp_path: Path,
    folded: Any,
    write_onnx: Any,
) -> None:
    kind = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    numpy_type = helper.tensor_dtype_to_np_dtype(kind)
    full = np.random.default_rng(2).standard_normal((6, 10)).astype(np.float32)
    weight = full.astype(numpy_type)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    node = ("MatMul", ["x", "lin.weight"], ["y"], {"name": "/lin/MatMul"})
    write_onnx(path, [node], {"lin.weight": weight.T}, {"x": [2, 10]}, {"y": [2, 6]}, kind)
    bundle = make_bundle(["lin"], {"lin": full})
    report = apply_onnx(path, bundle, out, mode=mode)
    assert any("another precision" in note for note in report.notes)
    want = weight.astype(np.float64) + exact_delta(bundle, "lin", (6, 10))
    constants = onnx.load(out).graph.initializer if mode == "merged" else []
    if mode == "unmerged" and dtype == "float16":
        constants = folded(out).graph.initializer
    elif mode == "unmerged":  # ONNX Runtime's CPU has no bfloat16 MatMul
        names = {t.name: t for t in onnx.load(out).graph.initializer}
        assert numpy_helper.to_array(names["lin.weight"]).tobytes() == weight.T.tobytes()
        onnx.checker.check_model(onnx.load(out), full_check=True)
        return
    (got,) = (numpy_helper.to_array(t) for t in constants if list(t.dims) == [10, 6])
    step = np.finfo(np.float16).eps if dtype == "float16" else 2.0**-7
    error = np.abs(got.T.astype(np.float64) - want)
    assert (error <= 0.5 * step * np.maximum(np.abs(want), 2.0**-14) * 1.0001 + 1e-6).all()


def test_overflow_names_the_tensor(make_bundle: Any, tmp_path: Path, write_onnx: Any) -> None:
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    constants = {"lin.weight": np.zeros((6, 10), np.float16)}
    node = ("Gemm", ["x", "lin.weight"], ["y"], {"transB": 1})
    write_onnx(path, [node], constants, {"x": [2, 10]}, {"y": [2, 6]}, TensorProto.FLOAT16)
    with pytest.raises(BadInputError, match=r"weight lin\.weight.*overflow"):
        apply_onnx(path, make_bundle(["lin"], scaling=1e7), out)
    assert list(tmp_path.iterdir()) == [path]


OTHER_USES: dict[str, list[tuple[Any, ...]]] = {
    "Einsum": [("Einsum", ["x", "lin.weight"], ["y"], {"equation": "bi,oi->b"})],
    "Gather": [("Gather", ["lin.weight", "rows"], ["y"])],
    "nothing that reaches an output": [
        ("Gemm", ["x", "lin.weight"], ["z"], {"transB": 1}),
        ("Identity", ["x"], ["y"]),
    ],
}


@pytest.mark.parametrize("mode", ["merged", "unmerged", "swappable", "paired", "bank"])
@pytest.mark.parametrize("use", OTHER_USES)
def test_a_weight_that_no_product_takes_as_it_is(
    use: str, mode: str, make_bundle: Any, tmp_path: Path, write_onnx: Any
) -> None:
    """The adapter would be dropped silently, or change something else than its layer."""
    weight = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    path, bundle = tmp_path / "in.onnx", make_bundle(["lin"], {"lin": weight})
    constants = {"lin.weight": weight, "rows": np.array([0, 3])}
    write_onnx(path, OTHER_USES[use], constants, {"x": [2, 10]}, {"y": None})
    with pytest.raises(BaseMismatchError) as caught:
        apply_onnx(path, bundle, tmp_path / "out.onnx", mode=mode)
    (why,) = caught.value.offenders
    dead = "no output depends on lin.weight"
    assert why == f"lin: {dead if 'output' in use else f'lin.weight is used by {use}'}"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("out", "location", "mode"),
    [
        ("weights", "weights", "merged"),
        ("out.onnx", "out.onnx.data", "merged"),
        ("in.onnx", "weights", "merged"),
        ("out.onnx", "out.expand.onnx", "paired"),
        ("out.onnx", "out.expand.onnx.data", "paired"),
    ],
)
def test_the_inputs_data_is_not_replaced(
    exports: dict[str, Path], make_bundle: Any, tmp_path: Path, out: str, location: str, mode: str
) -> None:
    """Neither by the outputs nor by the data beside them, even by force."""
    onnx.save_model(
        onnx.load(exports["torchscript"]), tmp_path / "in.onnx", save_as_external_data=True,
        location=location, size_threshold=0,
    )  # fmt: skip
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="apart from the inputs"):
        apply_onnx(tmp_path / "in.onnx", make_bundle(LAYERS), tmp_path / out, mode=mode, force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("layout", ["one file", "a file per tensor", "offsets"])
@pytest.mark.parametrize("mode", MODES)
def test_external_data(
    mode: str,
    layout: str,
    exports: dict[str, Path],
    make_bundle: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    """The same numbers as from the file with everything in it; untouched weights are copied."""
    path, out, plain = (tmp_path / name for name in ("in.onnx", "out.onnx", "plain.onnx"))
    source = onnx.load(exports["torchscript"])
    onnx.save_model(
        source,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=layout != "a file per tensor",
        location="weights" if layout == "one file" else None,
        size_threshold=100 if layout == "offsets" else 0,
    )
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    bundle = make_bundle(LAYERS)
    apply_onnx(exports["torchscript"], bundle, plain, mode=mode)
    report = apply_onnx(path, bundle, out, mode=mode)
    assert report.data == str(tmp_path / "out.onnx.data")
    assert report.bytes == sum(Path(p).stat().st_size for p in (out, report.data))
    a, b = (onnx.load(p) for p in (plain, out))
    constants = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (a, b)]
    assert constants[0].keys() == constants[1].keys()
    assert all((constants[0][k] == constants[1][k]).all() for k in constants[0])
    np.testing.assert_array_equal(run(out, {"x": x})["y"], run(plain, {"x": x})["y"])
    assert {k: (tmp_path / k).read_bytes() for k in before} == before
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("mode", ["swappable", "paired", "bank"])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_adapters_are_swapped_in_an_applied_file(
    exporter: str,
    mode: str,
    exports: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    exact_delta: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    """The default is the bundle's own; another one, with its own head, comes by a session."""
    from fourierft_export.onnx_graph.runtime.session import AdapterSession

    rng = np.random.default_rng(5)
    heads = [
        {
            "head.weight": rng.standard_normal((3, 8)).astype(np.float32),
            "head.bias": rng.standard_normal(3).astype(np.float32),
        }
        for _ in range(2)
    ]
    layers = [name for name in LAYERS if name != "head"]
    first = make_bundle(layers, weights_of(model), heads[0])
    second = make_bundle(layers[:2], weights_of(model), heads[1], n=30, seed=11, scaling=4.0)
    out = tmp_path / "out.onnx"
    report = apply_onnx(exports[exporter], first, out, mode=mode)
    assert set(report.layers) == set(layers)
    base = run(exports[exporter], {"x": x})["y"]
    wants = [exact(model, bundle, exact_delta, x) for bundle in (first, second)]
    if mode != "bank":
        np.testing.assert_allclose(run(out, {"x": x})["y"], wants[0], rtol=0, atol=1e-5)
    session = AdapterSession(out)
    session.load("first", first)
    session.load("second", second)
    for name, want in (("first", wants[0]), ("second", wants[1]), (None, base)):
        (got,) = session.run({"x": x}, adapter=name).values()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert min(np.abs(a - b).max() for a, b in ((base, wants[0]), (wants[0], wants[1]))) > 0.1
