"""What a killed apply left: data whose model never came (`tests/kill.py` does the killing)."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest


def test_data_whose_model_never_came_is_replaced(
    make_bundle: Any, tmp_path: Path, write_onnx: Any
) -> None:
    """A run killed between its two renames leaves the data, and the model in its work folder."""
    from fourierft_export.errors import UsageError
    from fourierft_export.onnx_graph.apply import apply_onnx

    write_onnx(
        tmp_path / "in.onnx",
        [("MatMul", ["x", "a.weight"], ["y"])],
        {"a.weight": np.ones((8, 8), np.float32)},
        {"x": ["n", 8]},
        {"y": ["n", 8]},
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    out = tmp_path / "out.onnx"
    data = tmp_path / "out.onnx.data"
    data.write_bytes(b"somebody's own")
    with pytest.raises(UsageError, match=r"out\.onnx\.data"):
        apply_onnx(tmp_path / "in.onnx", make_bundle(["a"]), out)
    assert data.read_bytes() == b"somebody's own"
    status = data.stat()
    left = tmp_path / "out.onnx.partial-graph"
    for identity in ([0, 1, 2], [status.st_ino, status.st_size, status.st_mtime_ns]):
        assert data.read_bytes() == b"somebody's own"
        left.mkdir()
        (left / ".lock").touch()
        (left / "out.onnx").write_bytes(b"a model that is not in its place")
        (left / ".moved").write_text(json.dumps({data.name: identity}))
        with (
            pytest.raises(UsageError, match=r"out\.onnx\.data")
            if identity[0] == 0
            else nullcontext()
        ):
            apply_onnx(tmp_path / "in.onnx", make_bundle(["a"]), out)
        assert not left.exists()
    assert data.stat().st_size == 256
    onnx.load(out)
