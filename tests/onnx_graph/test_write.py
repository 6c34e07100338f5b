"""An ONNX file is absent or complete, with its data beside it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fourierft_export.errors import FileAccessError, UsageError
from fourierft_export.onnx_graph.graph import write


def model(fill: float = 1.0, valid: bool = True) -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, ["n", 40])
    tensor = ir.tensor(np.full((40, 30), fill, np.float32), name="w")
    w = ir.Value(
        name="w", shape=ir.Shape([40, 30]), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    node = ir.node("MatMul" if valid else "NoSuchOperator", [x, w])
    node.outputs[0].name = "y"
    node.outputs[0].shape = ir.Shape(["n", 30])
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": 20}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def weight(path: Path) -> float:
    return float(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])[0, 0])


def test_embedded_by_default_and_with_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files = write.write_model(model(), tmp_path / "m.onnx")
        more = write.write_model(model(), tmp_path / "e.onnx", external_data=True)
    finally:
        os.umask(before)
    assert files == (tmp_path / "m.onnx",)
    assert {f.stat().st_mode & 0o777 for f in (*files, *more)} == {0o640}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.onnx", "e.onnx.data", "m.onnx"]


def test_external_data_where_it_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "MAX_EMBEDDED_BYTES", 40 * 30 * 4 - 1)
    out = tmp_path / "m.onnx"
    assert write.write_model(model(2.5), out) == (out, tmp_path / "m.onnx.data")
    (tensor,) = onnx.load(out, load_external_data=False).graph.initializer
    assert {e.key: e.value for e in tensor.external_data}["location"] == "m.onnx.data"
    assert weight(out) == 2.5


def test_existing_outputs_are_refused_without_force(tmp_path: Path) -> None:
    out, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    data.write_text("mine")
    with pytest.raises(UsageError, match=r"m\.onnx\.data"):
        write.write_model(model(), out, external_data=True)
    write.write_model(model(), out)
    assert data.read_text() == "mine"
    with pytest.raises(UsageError, match="pass --force"):
        write.write_model(model(9.0), out)
    assert weight(out) == 1.0


def test_force_replaces_model_and_data(tmp_path: Path) -> None:
    out, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    write.write_model(model(1.0), out, external_data=True)
    write.write_model(model(2.0), out, external_data=True, force=True)
    assert (weight(out), data.exists()) == (2.0, True)
    write.write_model(model(3.0), out, force=True)
    assert (weight(out), data.exists()) == (3.0, False)


@pytest.mark.parametrize("external", [False, True])
def test_an_invalid_model_leaves_nothing_and_the_old_one_in_place(
    tmp_path: Path, external: bool
) -> None:
    out = tmp_path / "m.onnx"
    with pytest.raises(onnx.checker.ValidationError):
        write.write_model(model(valid=False), out, external_data=external)
    assert list(tmp_path.iterdir()) == []
    write.write_model(model(), out, external_data=external)
    with pytest.raises(onnx.checker.ValidationError):
        write.write_model(model(valid=False), out, external_data=external, force=True)
    assert weight(out) == 1.0


def test_stopped_between_the_two_renames_there_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new model must never stand beside old data, nor an old model beside new data."""
    out = tmp_path / "m.onnx"
    write.write_model(model(), out, external_data=True)
    replace = os.replace

    def stop_at_model(source: Path, target: Path) -> None:
        if Path(target) == out:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_model)
    with pytest.raises(KeyboardInterrupt):
        write.write_model(model(2.0), out, external_data=True, force=True)
    assert not out.exists()
    assert not list(tmp_path.glob("*partial*"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="absent"):
        write.write_model(model(), tmp_path / "absent" / "m.onnx")
