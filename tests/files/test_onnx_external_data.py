"""External data of ONNX files: hostile locations and ranges are refused, all of them at once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fourierft_export.errors import BadInputError, FileAccessError
from fourierft_export.files.onnx_external_data import check_external_data

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def model(path: Path, **keys: str) -> onnx.ModelProto:
    """x -> x W, W being external data with these keys; `data.bin` holds 64 bytes before it."""
    data = path.parent / "data.bin"
    if not os.path.lexists(data):
        data.write_bytes(b"\0" * 64 + WEIGHT.tobytes())
    keys = {"location": "data.bin", "offset": "64", "length": "48"} | keys
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4], data_location=1)
    for key, value in keys.items():
        tensor.external_data.add(key=key, value=value)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 3), ("y", 4))
    )
    return helper.make_model(helper.make_graph([node], "g", [x], [y], [tensor]))


def test_a_plain_range(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert check_external_data(model(path), path) == {"data.bin": tmp_path / "data.bin"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"location": "/etc/passwd"}, "no plain path"),
        ({"location": "../data.bin"}, "no plain path"),
        ({"location": "a/../data.bin"}, "no plain path"),
        ({"location": "a\\data.bin"}, "no plain path"),
        ({"location": "C:data.bin"}, "no plain path"),
        ({"location": "data\0.bin"}, "no plain path"),
        ({"location": ""}, "no plain path"),
        ({"location": "."}, "no plain path"),
        ({"length": "1000000000000000"}, "its shape needs 48"),
        ({"length": "47"}, "its shape needs 48"),
        ({"offset": "-1"}, "offset '-1'"),
        ({"offset": "65"}, "of a file of 112"),
        ({"offset": "9" * 400}, "offset"),
        ({"offset": "1e3"}, "offset"),
        ({"basepath": "x"}, "unknown key"),
    ],
)
def test_hostile_keys(keys: dict[str, str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(BadInputError) as caught:
        check_external_data(model(path, **keys), path)
    assert says in str(caught.value)
    assert "'w'" in str(caught.value)


def test_links_are_refused_but_those_of_a_download_cache(tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"\0" * 112)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.onnx"
    (folder / "data.bin").symlink_to(outside)
    with pytest.raises(BadInputError, match="a link to"):
        check_external_data(model(path), path, allow_links=True)
    (folder / "data.bin").unlink()
    os.link(outside, folder / "data.bin")
    with pytest.raises(BadInputError, match="hard link"):
        check_external_data(model(path), path)
    (folder / "data.bin").unlink()
    (folder / "real.bin").write_bytes(b"\0" * 112)
    (folder / "data.bin").symlink_to("real.bin")
    with pytest.raises(BadInputError, match="--allow-links"):
        check_external_data(model(path), path)
    assert check_external_data(model(path), path, allow_links=True)
    # a linked folder on the way
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(BadInputError, match="a link to"):
        check_external_data(model(path, location="sub/outside.bin"), path)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(b"\0" * 112)
    (snapshot / "data.bin").symlink_to("../../blobs/abc")
    cached = snapshot / "model.onnx"
    assert check_external_data(model(cached), cached) == {"data.bin": snapshot / "data.bin"}


def test_missing_and_odd_files(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(FileAccessError):
        check_external_data(model(path, location="absent.bin"), path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInputError, match="no regular file"):
        check_external_data(model(path, location="folder"), path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(BadInputError, match="no regular file"):
            check_external_data(model(path, location="fifo"), path)


def test_tensors_are_found_wherever_they_hide(tmp_path: Path) -> None:
    """In a subgraph, in a Constant node's attribute, and in a function."""
    path = tmp_path / "model.onnx"
    inner = model(path, location="../x")
    branch = helper.make_node("If", ["c"], ["z"], then_branch=inner.graph, else_branch=inner.graph)
    constant = helper.make_node("Constant", [], ["k"], value=inner.graph.initializer[0])
    function = helper.make_function("d", "F", [], ["k"], [constant], [helper.make_opsetid("", 18)])
    for nodes, functions in (([branch], []), ([constant], []), ([], [function])):
        graph = helper.make_graph(nodes, "g", [], [])
        with pytest.raises(BadInputError, match="no plain path"):
            check_external_data(helper.make_model(graph, functions=functions), path)
