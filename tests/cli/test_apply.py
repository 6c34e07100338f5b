"""apply and recover --onnx at the command line: results, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.cli.main import run


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """An ONNX file with one named and one anonymous weight, and a bundle for both."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("a.weight", "w")}
    nodes = [
        helper.make_node("Gemm", ["x", "a.weight"], ["h"], transB=1),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy"]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], tensors)
    opset = helper.make_opsetid("", 18)
    path = tmp_path / "in.onnx"
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[opset]), path)
    layers = ("a", "b")
    spec = AdapterSpec(7, 9.0, tuple(LayerSpec(name, 12) for name in layers))
    spectra = {name: rng.standard_normal(12).astype(np.float32) for name in layers}
    return path, Bundle.build(spec, spectra).save(tmp_path / "b.fourierft.safetensors")


def test_there_and_back(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bundle = files
    out, back = tmp_path / "out.onnx", tmp_path / "back.fourierft.safetensors"
    words = ["apply", "--onnx", str(path), "--bundle", str(bundle), "--mode", "unmerged"]
    words += ["-o", str(out)]
    assert run(words) == 4
    told = capsys.readouterr().err
    assert "--map LAYER=INITIALIZER" in told
    assert "w [8, 8]" in told
    assert not out.exists()
    assert run([*words, "--map", "b=w", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["apply"]["layers"] == ["a", "b"]
    assert report["apply"]["mode"] == "unmerged"
    assert run(["recover", "--onnx", str(out), "-o", str(back), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recover"]["layers"] == 2
    assert back.read_bytes() == bundle.read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--mode", "merged", "--map", "b:w"], 2, "LAYER=INITIALIZER"),
        (["--mode", "merged", "--map", "c=w"], 2, "layers of the adapter"),
        (["--mode", "merged", "--weight", "1", "--weight", "2"], 2, "one for each of 1"),
        (["--mode", "merged", "--weight", "nan"], 2, "finite numbers"),
        (["--mode", "melted"], 2, "melted"),
        (["--mode", "merged", "--base", "absent"], 6, "absent"),
    ],
)
def test_mistakes(
    words: list[str],
    code: int,
    says: str,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, bundle = files
    out = tmp_path / "out.onnx"
    start = ["apply", "--onnx", str(path), "--bundle", str(bundle), "-o", str(out)]
    assert run([*start, *words]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not out.exists()


def test_hostile_external_data(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bundle = files
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    onnx.save(model, path)
    out = tmp_path / "out.onnx"
    words = ["apply", "--onnx", str(path), "--bundle", str(bundle), "--mode", "merged"]
    assert run([*words, "-o", str(out)]) == 3
    error = capsys.readouterr().err
    assert "a.weight" in error
    assert "no plain path" in error
    assert not out.exists()


def test_recover_needs_one_source(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = files
    out = str(tmp_path / "out")
    assert run(["recover", "-o", out]) == 2
    assert run(["recover", "--onnx", str(path), "--base", str(path), "-o", out]) == 2
    assert run(["recover", "--onnx", str(path), "-o", out]) == 2
    assert "no adapter in its metadata" in capsys.readouterr().err
    assert run(["recover", "--onnx", str(tmp_path / "absent"), "-o", out]) == 6
