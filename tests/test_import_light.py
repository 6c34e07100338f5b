"""What must work without torch does; what must be instant imports nothing heavy.

Each case runs in a process of its own, since this one has imported torch long ago.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from fourierft_export import Bundle
from fourierft_export.spectral.delta import reference_delta

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
if argv:
    from fourierft_export.cli.main import run
    code = run(argv)
loaded = [name for name in heavy if sys.modules.get(name) is not None]
print(json.dumps(loaded), file=sys.stderr)
sys.exit(code)
"""


def run(*argv: object, poisoned: list[str]) -> tuple[str, list[str]]:
    """(stdout, heavy packages loaded) of a command line that must succeed."""
    arguments = json.dumps([HEAVY, poisoned, list(map(str, argv))])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def bundle(stories_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `stories_adapter`, packed where no heavy package can be imported."""
    path = tmp_path_factory.mktemp("light") / "a.fourierft.safetensors"
    run("pack", stories_adapter, "-o", path, poisoned=HEAVY)
    return path


def test_import_loads_nothing_heavy() -> None:
    assert run(poisoned=[]) == ("", [])


@pytest.mark.parametrize("command", ["--help", "--version", "train --help", "demo --help"])
def test_help_loads_nothing_heavy(command: str) -> None:
    stdout, loaded = run(*command.split(), poisoned=["numpy"])
    assert "fourierft-export" in stdout
    assert loaded == []


@pytest.mark.parametrize(
    ("source", "piece"),
    [("bundle", "q_proj"), ("stories_adapter", "q_proj"), ("stories260k", "LlamaForCausalLM")],
)
def test_inspect_loads_nothing_heavy(
    source: str, piece: str, request: pytest.FixtureRequest
) -> None:
    stdout, loaded = run("inspect", request.getfixturevalue(source), poisoned=[])
    assert piece in stdout
    assert loaded == []


@pytest.mark.parametrize("bound", [False, True])
def test_pack_without_torch(
    bound: bool, stories_adapter: Path, stories260k: Path, tmp_path: Path
) -> None:
    """The bundle is the same, byte for byte, as where torch is there to be used."""
    base = ["--base", stories260k] if bound else []
    packed = []
    for poisoned in (HEAVY, []):
        out = tmp_path / f"{len(poisoned)}.fourierft.safetensors"
        run("pack", stories_adapter, "-o", out, *base, poisoned=poisoned)
        packed.append(out.read_bytes())
    assert len(packed[0]) > 10 * 100 * 4
    assert packed[0] == packed[1]


def test_unpack_without_torch(bundle: Path, stories_adapter: Path, tmp_path: Path) -> None:
    run("unpack", bundle, "-o", tmp_path / "peft", poisoned=HEAVY)
    name = "adapter_model.safetensors"
    before, after = load_file(stories_adapter / name), load_file(tmp_path / "peft" / name)
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_merge_without_torch(bundle: Path, stories260k: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    run("merge", "--base", stories260k, "--bundle", bundle, "-o", out, poisoned=["torch"])
    assert (out / "config.json").is_file()
    assert (out / "model.safetensors").stat().st_size > 1_000_000


def test_apply_without_torch(bundle: Path, stories260k: Path, tmp_path: Path) -> None:
    """Into an existing ONNX file with anonymous weights, which the base's content finds."""
    loaded = Bundle.load(bundle).bind(stories260k)
    weights = load_file(stories260k / "model.safetensors")
    nodes, tensors, outputs = [], [], []
    for i, layer in enumerate(loaded.layers):
        weight = np.ascontiguousarray(weights[f"{layer.name}.weight"].T)
        tensors.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
        shape = ["n", weight.shape[1]]
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, shape))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    graph = helper.make_graph(nodes, "g", [x], outputs, tensors)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    opset = helper.make_opsetid("", 9)
    onnx.save(helper.make_model(graph, ir_version=4, opset_imports=[opset]), path)
    words = ["apply", "--onnx", path, "--bundle", bundle, "--mode", "merged", "-o", out]
    run(*words, "--base", stories260k, poisoned=["torch", "onnxruntime", "transformers"])
    got = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    for i, layer in enumerate(loaded.layers):
        weight, entries = weights[f"{layer.name}.weight"], loaded.entries(layer.name)
        delta = reference_delta(
            loaded.spectra[layer.name], entries, weight.shape, loaded.spec.scaling
        )
        np.testing.assert_allclose(got[f"w{i}"].T, weight + delta, rtol=0, atol=1e-5)
        assert abs(delta).max() > 1e-3
