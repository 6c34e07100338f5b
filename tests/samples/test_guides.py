"""The guides in samples/: each program runs offline, and writes what its README says.

What they write is compared with float64 arithmetic: delta_W is scaling * Re(ifft2(F)), where F holds
the spectrum at the places that torch.randperm gives, and is zero elsewhere (arXiv 2405.03003).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors import safe_open
from safetensors.torch import load_file

import fourierft_export as ff

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


def delta(spectrum: Any, shape: tuple[int, int], seed: int, scaling: float) -> np.ndarray:
    """delta_W of a layer in float64, (out, in)."""
    size = shape[0] * shape[1]
    places = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    dense = np.zeros(size)
    dense[places[: len(spectrum)].numpy()] = np.asarray(spectrum, np.float64)
    return np.fft.ifft2(dense.reshape(shape)).real * scaling


def deltas(path: Path) -> dict[str, np.ndarray]:
    """Layer -> delta_W of a bundle's file."""
    bundle = ff.Bundle.load(path)
    seed, scaling = int(bundle.spec.seed), float(bundle.spec.scaling)
    return {
        layer.name: delta(bundle.spectra[layer.name], layer.shape, seed, scaling)
        for layer in bundle.layers
        if layer.shape is not None
    }


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def check_own_model(folder: Path, printed: str) -> None:
    weights = {k: v.double().numpy() for k, v in torch.load(folder / "base.pt").items()}
    for layer, change in deltas(folder / "rotated.fourierft.safetensors").items():
        weights[f"{layer}.weight"] += change

    def linear(x: np.ndarray, layer: str) -> np.ndarray:
        return x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]

    x = np.random.default_rng(0).random((5, 64))
    hidden = relu(linear(x, "embed"))
    for layer in ("blocks.0", "blocks.1"):
        hidden = hidden + relu(linear(hidden, layer))
    got = run(folder / "rotated.onnx", {"pixels": x.astype(np.float32)})
    np.testing.assert_allclose(got, linear(hidden, "head"), rtol=1e-4, atol=1e-4)
    before, after = zip(*re.findall(r"digits +([\d.]+)% -> +([\d.]+)%", printed), strict=True)
    assert max(map(float, before)) < 30 < 80 < min(map(float, after))
    assert re.search(r"bit for bit: True", printed)


def check_large_checkpoint(folder: Path, printed: str) -> None:
    changes = deltas(folder / "adapter.fourierft.safetensors")
    shards = sorted(path.name for path in (folder / "base").glob("*.safetensors"))
    assert len(changes) == 16
    assert len(shards) == 6
    for shard in shards:
        base, merged = load_file(folder / "base" / shard), load_file(folder / "merged" / shard)
        for name, weight in base.items():
            change = changes.pop(name.removesuffix(".weight"), None)
            if change is None:
                assert torch.equal(merged[name], weight)
            else:  # bfloat16 keeps eight bits
                want, got = weight.double().numpy() + change, merged[name].double().numpy()
                np.testing.assert_allclose(got, want, rtol=2.0**-8, atol=1e-7)
    assert not changes
    assert printed.count("the same: True") == 3
    assert re.search(r"resumed: [1-5] of 6 shards", printed)
    assert "verify merged: True" in printed
    assert f"verify damaged: {shards[0]}" in printed
    assert not list(folder.glob("*.partial-*"))
    # Coefficients at mirrored places are not unique; delta_W is.
    original = deltas(folder / "adapter.fourierft.safetensors")
    for name, found in deltas(folder / "recovered.fourierft.safetensors").items():
        assert np.linalg.norm(found - original[name]) < 0.02 * np.linalg.norm(original[name])


def check_foreign_onnx(folder: Path, printed: str) -> None:
    tensors = onnx.load(folder / "anonymous.onnx").graph.initializer
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in tensors}
    changes = deltas(folder / "adapter.fourierft.safetensors")
    x = np.random.default_rng(1).standard_normal((2, 5, 64))
    want = x
    for block, names in (("blocks.0", ("w0", "w1", "w2")), ("blocks.1", ("w3", "w4", "w5"))):
        query, key, value = (weights[name] for name in names)  # stored as (in, out)
        query = query + changes[f"{block}.query"].T
        value = value + changes[f"{block}.value"].T
        scores = np.exp((want @ query) @ np.swapaxes(want @ key, 1, 2) / 8)
        want = want + scores / scores.sum(-1, keepdims=True) @ (want @ value)
    feeds = {"x": x.astype(np.float32)}
    floats = [f"{n}.{m}" for n in ("torchscript", "dynamo", "anonymous", "external")
              for m in ("merged", "unmerged")]  # fmt: skip
    for name in [*floats, "mapped"]:
        got = run(folder / f"{name}.onnx", feeds)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)
    assert (folder / "external.merged.onnx.data").exists()
    # The reference evaluator multiplies integers exactly, which not every CPU does.
    got = ReferenceEvaluator(str(folder / "int8.unmerged.onnx")).run(None, feeds)[0]
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
    assert "merged into int8: refused" in printed
    assert not (folder / "refused.onnx").exists()
    assert "4 of 4 layers" in printed


def check_peft_to_onnx(folder: Path, printed: str) -> None:
    spectra = load_file(folder / "adapter/adapter_model.safetensors")
    merged = load_file(folder / "merged/model.safetensors")
    base = next(Path(p) for p in re.findall(r"base +(/.*)", printed))
    with safe_open(base / "model.safetensors", "np") as file:
        for i in range(6):
            layer = f"encoder.layer.{i}.attention.self.query"
            weight = file.get_tensor(f"{layer}.weight").astype(np.float64)
            spectrum = spectra[f"base_model.model.bert.{layer}.fourierft_spectrum"]
            want = weight + delta(spectrum, weight.shape, 777, 150.0)
            np.testing.assert_allclose(merged[f"bert.{layer}.weight"], want, atol=1e-6)
    head = spectra["base_model.model.classifier.weight"]
    assert torch.equal(merged["classifier.weight"], head)
    ids = np.arange(1000, 1012).reshape(2, 6)
    feeds = {"input_ids": ids, "attention_mask": ids**0, "token_type_ids": ids * 0}
    two = [run(folder / f"{mode}.onnx", feeds) for mode in ("merged", "unmerged")]
    np.testing.assert_allclose(*two, atol=1e-5)
    assert "15 pairs compared, all agree" in printed


def check_many_tenants(folder: Path, printed: str) -> None:
    from transformers import BertForSequenceClassification

    def logits(tenant: str | None, inputs: dict[str, np.ndarray]) -> np.ndarray:
        model = BertForSequenceClassification.from_pretrained(folder / "base").double().eval()
        if tenant:
            path = folder / f"{tenant}.fourierft.safetensors"
            weights = model.state_dict()
            for layer, change in deltas(path).items():
                weights[f"{layer}.weight"] += torch.from_numpy(change)
            for name, tensor in ff.Bundle.load(path).saved.items():
                weights[name].copy_(torch.from_numpy(tensor.copy()))
        with torch.no_grad():
            return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()

    with np.load(folder / "served.npz") as file:
        served = dict(file)
    got = served.pop("logits")
    for row, tenant in enumerate(("tenant-a", "tenant-b", None, "tenant-c")):
        want = logits(tenant, {name: array[row : row + 1] for name, array in served.items()})
        np.testing.assert_allclose(got[row], want[0], atol=1e-4)
    # swap.py, which knows nothing of this package, on two rows of eight tokens.
    ids = np.arange(100, 116).reshape(2, 8)
    inputs = {"input_ids": ids, "attention_mask": ids**0, "token_type_ids": ids * 0}
    for tenant in ("tenant-a", "tenant-b"):
        want = logits(tenant, inputs).ravel()
        for suffix in ("onnx_adapter", "inputs.safetensors"):
            shown = printed.split(f"{tenant}.{suffix} ")[1].removeprefix("expanded in ")
            shown = re.findall(r"-?\d+\.\d*", shown)[:6]
            np.testing.assert_allclose(np.array(shown, float), want, atol=1e-4)


GUIDES = {
    "own_model/train.py": check_own_model,
    "large_checkpoint/merge.py": check_large_checkpoint,
    "foreign_onnx/adapt.py": check_foreign_onnx,
    "peft_to_onnx/convert.py": check_peft_to_onnx,
    "many_tenants/serve.py": check_many_tenants,
}


def run_program(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, SAMPLES / program, "-o", folder / "out"], cwd=folder,
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, Future[subprocess.CompletedProcess[str]]]]]:
    """The programs of the selected tests, two at a time: each waits for one thread mostly."""
    selected = [i.callspec.params["program"] for i in request.node.session.items
                if getattr(i, "originalname", "") == "test_guide"]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        folders = {program: tmp_path_factory.mktemp("guide") for program in selected}
        yield {p: (folder, pool.submit(run_program, p, folder)) for p, folder in folders.items()}


@pytest.mark.timeout(900)  # five programs that import torch: minutes on a busy machine
@pytest.mark.parametrize("program", GUIDES)
def test_guide(program: str, runs: Any) -> None:
    folder, future = runs[program]
    done = future.result()
    assert done.returncode == 0, done.stdout + done.stderr
    check: Callable[[Path, str], None] = GUIDES[program]
    check(folder / "out", done.stdout)


@pytest.mark.parametrize("program", GUIDES)
def test_options_in_a_readme_exist(program: str) -> None:
    text = (SAMPLES / program).with_name("README.md").read_text("utf-8").replace("\\\n", " ")
    used = re.findall(r"^(?:fourierft-export|\$ fourierft-export) (\w+)(.*)$", text, re.MULTILINE)
    for verb, words in used:
        shown = CliRunner().invoke(command_line, [verb, "--help"]).output
        missing = [w for w in re.findall(r"(?<= )--?[a-z-]+", words) if not re.search(rf"{w}\b", shown)]
        assert not missing, f"{verb}: {missing}"
    assert Path(program).name in text
