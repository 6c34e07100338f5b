"""An ONNX file is absent or complete, with its data beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import fourierft_export as ff
from fourierft_export.errors import BadInputError, FileAccessError, UsageError
from fourierft_export.onnx_graph.graph import write


def save(path: Path, fill: float, external: bool) -> Path:
    """`y = x w`, with 30 outputs, of which the adapter's layer is all."""
    values = [helper.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 40), ("y", 30))]
    weight = numpy_helper.from_array(np.full((40, 30), fill, np.float32), "w.weight")
    nodes = [helper.make_node("MatMul", ["x", "w.weight"], ["y"], "/w/MatMul")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save_model(
        model, path, save_as_external_data=external, location=f"{path.name}.bin", size_threshold=0
    )
    return path


@pytest.fixture
def apply(make_bundle: Any, tmp_path: Path) -> Any:
    """`apply(out, fill=1.0, external=True, **options)`: a merged file whose weights are `fill`."""
    (tmp_path / "base").mkdir()

    def make(out: Path, fill: float = 1.0, external: bool = True, **options: Any) -> ff.Bundle:
        source = save(tmp_path / "base" / f"{fill}-{external}.onnx", fill, external)
        bundle = make_bundle(["w"], scaling=0.0)
        return ff.apply_onnx(source, bundle, out, **options)

    return make


def weight(path: Path) -> float:
    (tensor,) = onnx.load(path).graph.initializer
    assert numpy_helper.to_array(tensor).shape == (40, 30)
    return float(numpy_helper.to_array(tensor)[39, 29])


def test_data_stays_where_it_was_with_the_mode_that_the_umask_asks_for(
    apply: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    before = os.umask(0o027)
    try:
        reports = [apply(out / "m.onnx", external=False), apply(out / "e.onnx")]
    finally:
        os.umask(before)
    assert [report.data for report in reports] == [None, str(out / "e.onnx.data")]
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}
    assert sorted(p.name for p in out.iterdir()) == ["e.onnx", "e.onnx.data", "m.onnx"]


def test_external_data_where_it_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    net, x = torch.nn.Sequential(torch.nn.Linear(40, 30)), torch.zeros(2, 40)
    ff.inject(net, ff.FourierFTConfig(n_frequency=5, target_modules=["0"]))
    monkeypatch.setattr(write, "_MAX_EMBEDDED", 40 * 30 * 4 - 1)
    ff.export_onnx(net, {"input": x}, tmp_path / "m.onnx", mode="merged")
    held = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    (tensor,) = (t for t in held if list(t.dims) == [30, 40])
    assert {e.key: e.value for e in tensor.external_data}["location"] == "m.onnx.data"


def test_existing_outputs_are_refused_without_force(apply: Any, tmp_path: Path) -> None:
    out, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    data.write_text("mine")
    with pytest.raises(UsageError, match=r"m\.onnx\.data"):
        apply(out)
    apply(out, external=False)
    assert data.read_text() == "mine"
    with pytest.raises(UsageError, match="pass --force"):
        apply(out, 9.0)
    assert weight(out) == 1.0
    for fill, external in ((2.0, True), (3.0, True), (4.0, False)):
        apply(out, fill, external, force=True)
        assert (weight(out), data.exists()) == (fill, external)
    with pytest.raises(FileAccessError, match="absent"):
        apply(tmp_path / "absent" / "m.onnx")


def test_stopped_between_the_two_renames_there_is_no_model(
    apply: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new model must never stand beside old data, nor an old model beside new data."""
    out = tmp_path / "m.onnx"
    apply(out)
    replace = os.replace

    def stop_at_model(source: Path, target: Path) -> None:
        if Path(target) == out:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_model)
    with pytest.raises(KeyboardInterrupt):
        apply(out, 2.0, force=True)
    assert not out.exists()
    assert not list(tmp_path.glob("*partial*"))


def test_data_that_shrinks_while_it_is_copied(make_bundle: Any, tmp_path: Path) -> None:
    """An error that names the file, neither a crash nor a file with a hole."""
    source, out = save(tmp_path / "in.onnx", 1.0, True), tmp_path / "m.onnx"

    def shrink(what: str, done: int, total: int) -> None:
        if what == "copy":
            os.truncate(tmp_path / "in.onnx.bin", 40)

    nothing = make_bundle(["w"], scaling=0.0)
    with pytest.raises(BadInputError, match=r"in\.onnx\.bin"):
        ff.apply_onnx(source, nothing, out, mode="unmerged", progress=shrink)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "in.onnx.bin"]
