"""What must work without torch does; what must be instant imports nothing heavy.

Each case runs in a process of its own, since this one has imported torch long ago.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "scipy", "peft", "sklearn"]

# Runs the command line (or only the import, without arguments), then prints on the last line of
# stderr which heavy packages are loaded; poisoned ones raise ImportError when imported.
SCRIPT = """
import json, sys
heavy, poisoned, argv = json.loads(sys.argv[1])
for name in poisoned:
    sys.modules[name] = None
code = 0
import fourierft_export
if argv is not None:
    from fourierft_export.cli.main import main
    sys.argv = ["fourierft-export", *argv]
    try:
        main()
    except SystemExit as done:
        code = done.code or 0
loaded = [name for name in heavy if sys.modules.get(name) is not None]
print(json.dumps(loaded), file=sys.stderr)
sys.exit(code)
"""


def run(argv: list[str] | None, poisoned: list[str]) -> tuple[str, list[str]]:
    """(stdout, heavy packages loaded) of a command line that must succeed."""
    arguments = json.dumps([HEAVY, poisoned, argv])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def bundle(stories_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `stories_adapter`, packed where no heavy package can be imported."""
    path = tmp_path_factory.mktemp("light") / "a.fourierft.safetensors"
    run(["pack", str(stories_adapter), "-o", str(path)], poisoned=HEAVY)
    return path


def test_import_loads_nothing_heavy() -> None:
    assert run(None, poisoned=[]) == ("", [])


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["--version"], ["pack", "--help"], ["export", "--help"], ["demo", "--help"]],
)
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    stdout, loaded = run(argv, poisoned=[])
    assert "fourierft-export" in stdout
    assert loaded == []


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(
    ("source", "tells"),
    [("bundle", "q_proj"), ("adapter", "q_proj"), ("checkpoint", "LlamaForCausalLM")],
)
def test_inspect_loads_nothing_heavy(
    source: str,
    tells: str,
    options: list[str],
    bundle: Path,
    stories_adapter: Path,
    stories260k: Path,
) -> None:
    path = {"bundle": bundle, "adapter": stories_adapter, "checkpoint": stories260k}[source]
    stdout, loaded = run(["inspect", str(path), *options], poisoned=[])
    assert tells in stdout
    assert loaded == []


@pytest.mark.parametrize("bound", [False, True])
def test_pack_without_torch(
    bound: bool, stories_adapter: Path, stories260k: Path, tmp_path: Path
) -> None:
    """The bundle is the same, byte for byte, as where torch is there to be used."""
    base = ["--base", str(stories260k)] if bound else []
    packed = []
    for poisoned in (HEAVY, []):
        out = tmp_path / f"{len(poisoned)}.fourierft.safetensors"
        run(["pack", str(stories_adapter), "-o", str(out), *base], poisoned)
        packed.append(out.read_bytes())
    assert len(packed[0]) > 10 * 100 * 4
    assert packed[0] == packed[1]


def test_unpack_without_torch(bundle: Path, stories_adapter: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    run(["unpack", str(bundle), "-o", str(tmp_path / "peft")], poisoned=HEAVY)
    name = "adapter_model.safetensors"
    before, after = load_file(stories_adapter / name), load_file(tmp_path / "peft" / name)
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)


def test_merge_without_torch(bundle: Path, stories260k: Path, tmp_path: Path) -> None:
    """Merging is numpy work: only models and proof need torch."""
    out = tmp_path / "merged"
    argv = ["merge", "--base", str(stories260k), "--bundle", str(bundle), "-o", str(out)]
    run(argv, poisoned=["torch"])
    assert (out / "config.json").is_file()
    assert (out / "model.safetensors").stat().st_size > 1_000_000


def test_apply_without_torch(bundle: Path, stories260k: Path, tmp_path: Path) -> None:
    """Into an existing ONNX file with anonymous weights, which the base's content finds."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file

    from fourierft_export import Bundle
    from fourierft_export.spectral.delta import reference_delta
    from fourierft_export.spectral.entries import spectral_entries

    weights = load_file(stories260k / "model.safetensors")
    layers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(5) for p in "qv"]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    nodes, tensors, outputs = [], [], []
    for i, layer in enumerate(layers):
        weight = np.ascontiguousarray(weights[f"{layer}.weight"].T)
        tensors.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
        size = weight.shape[1]
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["n", size]))
    graph = helper.make_graph(nodes, "g", [x], outputs, tensors)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    opset = helper.make_opsetid("", 9)
    onnx.save(helper.make_model(graph, ir_version=4, opset_imports=[opset]), path)
    argv = ["apply", "--onnx", str(path), "--bundle", str(bundle), "--mode", "merged"]
    argv += ["--base", str(stories260k), "-o", str(out), "--json"]
    stdout, _ = run(argv, poisoned=["torch", "onnxruntime", "transformers"])
    report = json.loads(stdout)["apply"]
    assert sorted(report["layers"]) == sorted(layers)
    got = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    loaded = Bundle.load(bundle)
    for i, layer in enumerate(layers):
        weight = weights[f"{layer}.weight"]
        entries = spectral_entries(loaded.spec.entry_seed, weight.shape, 100)
        delta = reference_delta(loaded.spectra[layer], entries, weight.shape, loaded.spec.scaling)
        np.testing.assert_allclose(got[f"w{i}"].T, weight + delta, rtol=0, atol=1e-5)
        assert abs(delta).max() > 1e-3
