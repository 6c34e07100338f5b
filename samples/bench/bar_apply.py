"""apply: eight weights of a 2 GB ONNX file with external data, against onnx.load + save."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import Row, faster, within

COUNT, SIZE, N, CHANGED = 31, 4096, 1000, 8
ROUNDS = 5
GIB = 1024.0


def apply() -> Iterator[Row]:
    """Each side in a process of its own, in turn; the outputs are compared tensor by tensor."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, adapter = make_files(folder)
        taken: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
        for round_ in range(ROUNDS + 1):
            for side, times in taken.items():
                out = folder / f"{side}.onnx"
                for old in folder.glob(f"{side}.onnx*"):
                    old.unlink()
                times.append(run_side(side, source, adapter, out))
            if round_ == 0:
                compare(folder)
                taken = {"ours": [], "peer": []}  # the warm-up
        seconds = {side: statistics.median(t for t, _ in each) for side, each in taken.items()}
        peak = max(m for _, m in taken["ours"])
        peer_peak = max(m for _, m in taken["peer"])
    case = f"{COUNT} x {SIZE}x{SIZE} float32, {CHANGED} changed"
    yield faster("apply", case, seconds["ours"], seconds["peer"], 3.0, "onnx.load + save")
    yield within("apply", f"peak memory (peer: {peer_peak:.0f})", peak, GIB, 0.5, "1 GiB", "MiB")


def make_files(folder: Path) -> tuple[Path, Path]:
    """The model with random weights, and an unbound bundle for eight of its layers."""
    from onnx import TensorProto, helper, save_model

    from fourierft_export.bundle.bundle import Bundle
    from fourierft_export.bundle.spec import AdapterSpec, LayerSpec

    rng = np.random.default_rng(0)
    nbytes = 4 * SIZE * SIZE
    nodes, tensors = [], []
    with open(folder / "weights", "wb") as file:
        for i in range(COUNT):
            weight = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
            file.write((weight * np.float32(0.02)).data)
            name = f"layers.{i}.weight"
            tensor = TensorProto(name=name, data_type=1, dims=[SIZE, SIZE], data_location=1)
            for key, value in (("location", "weights"), ("offset", i * nbytes), ("length", nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            nodes.append(helper.make_node("Gemm", [f"x{i}", name], [f"x{i + 1}"], transB=1))
    io = [
        helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, SIZE]) for x in ("x0", f"x{COUNT}")
    ]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], tensors)
    opset = helper.make_opsetid("", 18)
    source = folder / "source.onnx"
    save_model(helper.make_model(graph, ir_version=8, opset_imports=[opset]), source)
    layers = [f"layers.{i * 3}" for i in range(CHANGED)]
    spec = AdapterSpec(2024, 150.0, tuple(LayerSpec(name, N) for name in layers))
    spectra = {name: rng.standard_normal(N, dtype=np.float32) for name in layers}
    return source, Bundle.build(spec, spectra).save(folder / "adapter")


def run_side(side: str, source: Path, adapter: Path, out: Path) -> tuple[float, float]:
    """(seconds, peak MiB) of one side."""
    script = Path(__file__).with_name("apply_side.py")
    command = [sys.executable, str(script), side, str(source), str(adapter), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def compare(folder: Path) -> None:
    """Stop the bench where the two outputs hold different weights."""
    import onnx

    sides = [
        {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
        for path in (folder / "ours.onnx", folder / "peer.onnx")
    ]
    for name in sides[0]:
        arrays = []
        for tensors in sides:
            keys = {entry.key: entry.value for entry in tensors[name].external_data}
            offset, length = int(keys.get("offset", 0)), int(keys["length"])
            with open(folder / keys["location"], "rb") as file:
                file.seek(offset)
                arrays.append(file.read(length))
        if arrays[0] != arrays[1] or len(arrays[0]) != 4 * SIZE * SIZE:
            raise SystemExit(f"apply: the two sides differ in {name}")


BARS = {"apply": apply}
