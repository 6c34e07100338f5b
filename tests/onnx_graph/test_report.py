"""The report says the same of a file, whether it was exported or made by `apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import fourierft_export as ff
from fourierft_export.onnx_graph.apply import apply_onnx
from fourierft_export.onnx_graph.mode_names import MODES


@pytest.mark.parametrize("mode", MODES)
def test_inputs_and_outputs(mode: str, make_bundle: Any, tmp_path: Path) -> None:
    """What every run must be fed; not the adapter, whose inputs have defaults."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).eval()
    bundle = make_bundle(["0"], {"0": net[0].weight.detach().numpy()})
    plain, x = tmp_path / "plain.onnx", torch.zeros(2, 8)
    torch.onnx.export(
        net, (x,), plain, input_names=["x"], output_names=["y"], verbose=False, dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, opset_version=18,
    )  # fmt: skip
    applied = apply_onnx(plain, bundle, tmp_path / "applied.onnx", mode=mode)
    ff.attach(net, bundle)
    path = tmp_path / "exported.onnx"
    exported = ff.export_onnx(
        net, (x,), path, mode=mode, input_names=["x"], output_names=["y"],
        dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    assert exported.mode == applied.mode == mode
    ids = {"adapter_id": ("batch",)} if mode == "bank" else {}
    assert exported.inputs == applied.inputs == {"x": ("batch", 8)} | ids
    assert exported.outputs == applied.outputs == {"y": ("batch", 3)}
    graph = onnx.load(path).graph
    defaults = {tensor.name for tensor in graph.initializer}
    assert [v.name for v in graph.input if v.name not in defaults] == list(exported.inputs)


def test_adapter_inputs_without_defaults_must_be_fed(make_bundle: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh()).eval()
    ff.attach(net, make_bundle(["0"], {"0": net[0].weight.detach().numpy()}, n=10))
    path, x = tmp_path / "out.onnx", torch.zeros(2, 8)
    report = ff.export_onnx(net, (x,), path, mode="swappable", defaults="required")
    assert list(report.inputs) == [value.name for value in onnx.load(path).graph.input]
    assert len(report.inputs) == 4
    assert report.inputs["fourierft.entries.0"][1] == 2
