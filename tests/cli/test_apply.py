"""apply and recover --onnx at the command line: results, JSON, exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec


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
    files: tuple[Path, Path], tmp_path: Path, run_verb: Callable[..., Any]
) -> None:
    path, bundle = files
    out, back = tmp_path / "out.onnx", tmp_path / "back.fourierft.safetensors"
    words = ["apply", "--onnx", path, "--bundle", bundle, "--mode", "unmerged", "-o", out]
    code, _, err = run_verb(*words)
    assert code == 4 and "--map LAYER=INITIALIZER" in err and "w [8, 8]" in err
    assert not out.exists()
    code, found, _ = run_verb(*words, "--map", "b=w")
    assert (code, found["apply"]["layers"], found["apply"]["mode"]) == (0, ["a", "b"], "unmerged")
    assert run_verb("recover", "--onnx", out, "-o", back).json["recover"]["layers"] == 2
    assert back.read_bytes() == bundle.read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--mode merged --map b:w", 2, "LAYER=INITIALIZER"),
        ("--mode merged --map c=w", 2, "layers of the adapter"),
        ("--mode merged --weight 1 --weight 2", 2, "one for each of 1"),
        ("--mode merged --weight nan", 2, "finite numbers"),
        ("--mode melted", 2, "melted"),
        ("--mode merged --base absent", 6, "absent"),
    ],
)
def test_mistakes(
    words: str,
    code: int,
    says: str,
    files: tuple[Path, Path],
    tmp_path: Path,
    run_verb: Callable[..., Any],
) -> None:
    path, bundle = files
    start = ["apply", "--onnx", path, "--bundle", bundle, "-o", tmp_path / "out.onnx"]
    found = run_verb(*start, *words.split())
    assert found.code == code and says in found.err
    assert not (tmp_path / "out.onnx").exists()


def test_recover_needs_a_file_with_an_adapter(
    files: tuple[Path, Path], tmp_path: Path, run_verb: Callable[..., Any]
) -> None:
    path, out = files[0], tmp_path / "out"
    code, _, err = run_verb("recover", "--onnx", path, "-o", out)
    assert code == 2 and "no adapter in its metadata" in err
    assert run_verb("recover", "--onnx", tmp_path / "absent", "-o", out).code == 6
