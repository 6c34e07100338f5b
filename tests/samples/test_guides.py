"""The guides in samples/: each program runs offline, and writes what its README says.

What they write is compared with float64 arithmetic: delta_W is scaling * Re(ifft2(F)), where F
holds the spectrum at the places that torch.randperm gives, and zeros elsewhere (arXiv 2405.03003).
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file

import fourierft_export as ff
from fourierft_export.cli.main import verbs

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


def delta(spectrum: Any, shape: Any, seed: Any, scaling: float) -> np.ndarray:
    """delta_W of a layer in float64, (out, in)."""
    size = shape[0] * shape[1]
    places = torch.randperm(size, generator=torch.Generator().manual_seed(int(seed)))
    dense = np.zeros(size)
    dense[places[: len(spectrum)].numpy()] = np.asarray(spectrum, np.float64)
    return np.fft.ifft2(dense.reshape(shape)).real * scaling


def deltas(path: Path) -> dict[str, np.ndarray]:
    """Layer -> delta_W of a bundle's file."""
    bundle = ff.Bundle.load(path)
    how = (bundle.spec.seed, bundle.spec.scaling)
    return {x.name: delta(bundle.spectra[x.name], x.shape, *how) for x in bundle.layers}


def adapted(model: torch.nn.Module, bundle: Path | None) -> torch.nn.Module:
    """The model in float64, with a bundle's delta_W and saved tensors in its weights."""
    model = model.double().eval().requires_grad_(False)
    for layer, change in deltas(bundle).items() if bundle else ():
        model.get_submodule(layer).weight += torch.from_numpy(change)
    for name, tensor in ff.Bundle.load(bundle).saved.items() if bundle else ():
        model.get_parameter(name).copy_(torch.from_numpy(tensor.copy()))
    return model


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def check_own_model(folder: Path, printed: str) -> None:
    model, x = runpy.run_path(str(SAMPLES / "own_model/train.py"))["Reader"](), torch.rand(5, 64)
    model.load_state_dict(torch.load(folder / "base.pt"))
    want = adapted(model, folder / "rotated.fourierft.safetensors")(x.double())
    got = run(folder / "rotated.onnx", {"pixels": x.numpy()})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    before, after = zip(*re.findall(r"digits +([\d.]+)% -> +([\d.]+)%", printed), strict=True)
    assert max(map(float, before)) < 30 < 80 < min(map(float, after))
    assert "bit for bit: True" in printed


def check_large_checkpoint(folder: Path, printed: str) -> None:
    changes = deltas(folder / "adapter.fourierft.safetensors")
    shards = sorted(path.name for path in (folder / "base").glob("*.safetensors"))
    assert (len(changes), len(shards)) == (16, 6)
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
    assert f"verify merged: True\nverify damaged: {shards[0]}" in printed
    assert not list(folder.glob("*.partial-*"))
    # Coefficients at mirrored places are not unique; delta_W is.
    original = deltas(folder / "adapter.fourierft.safetensors")
    for name, found in deltas(folder / "recovered.fourierft.safetensors").items():
        assert np.linalg.norm(found - original[name]) < 0.02 * np.linalg.norm(original[name])


def check_foreign_onnx(folder: Path, printed: str) -> None:
    torch.manual_seed(0)
    model = runpy.run_path(str(SAMPLES / "foreign_onnx/adapt.py"))["Model"]()
    x = torch.randn(2, 5, 64)
    want = adapted(model, folder / "adapter.fourierft.safetensors")(x.double()).numpy()
    files = [path for path in folder.glob("*merged.onnx") if not path.name.startswith("int")]
    assert len(files) == 8
    for path in [*files, folder / "mapped.onnx"]:
        got = run(path, {"x": x.numpy()})
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=path.name)
    assert (folder / "external.merged.onnx.data").exists()
    # The reference evaluator multiplies integers exactly, which not every CPU does.
    (got,) = ReferenceEvaluator(str(folder / "int8.unmerged.onnx")).run(None, {"x": x.numpy()})
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
    assert "merged into int8: refused" in printed
    errors = re.findall(r"base ([\d.]+)%, with the adapter ([\d.]+)%", printed)  # int8 and 4 bits
    assert [float(after) < 3 * float(before) for before, after in errors] == [True, True]


def check_peft_to_onnx(folder: Path, printed: str) -> None:
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    merged = load_file(folder / "merged/model.safetensors")
    base = load_file(Path(re.findall(r"base +(.+)", printed)[0]) / "model.safetensors")
    for i in range(6):
        layer = f"encoder.layer.{i}.attention.self.query"
        spectrum = adapter[f"base_model.model.bert.{layer}.fourierft_spectrum"]
        want = base[f"{layer}.weight"].double().numpy() + delta(spectrum, (384, 384), 777, 150.0)
        np.testing.assert_allclose(merged[f"bert.{layer}.weight"], want, atol=1e-6)
    assert torch.equal(merged["classifier.weight"], adapter["base_model.model.classifier.weight"])
    ids = np.arange(1000, 1012).reshape(2, 6)
    feeds = {"input_ids": ids, "attention_mask": ids**0, "token_type_ids": ids * 0}
    one, other = (run(folder / f"{mode}.onnx", feeds) for mode in ("merged", "unmerged"))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert "15 pairs compared, all agree" in printed


def check_many_tenants(folder: Path, printed: str) -> None:
    from transformers import BertForSequenceClassification

    def logits(tenant: str | None, inputs: dict[str, np.ndarray]) -> np.ndarray:
        base = BertForSequenceClassification.from_pretrained(folder / "base")
        model = adapted(base, tenant and folder / f"{tenant}.fourierft.safetensors")
        return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()

    served = dict(np.load(folder / "served.npz"))
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
            shown = re.findall(r"-?\d+\.\d*", printed.split(f"{tenant}.{suffix} ")[1])[:6]
            np.testing.assert_allclose(np.array(shown, float), want, atol=1e-4)


def check_plain_loop(folder: Path, printed: str) -> None:
    found = {line[:22].strip(): float(line[22:]) for line in printed.splitlines()}
    assert found["base, upright"] == found["detached, upright"] > 0.9
    assert found["base, inverted"] < 0.3 < 0.8 < found["adapter, inverted"]
    assert found["reloaded, inverted"] == found["adapter, inverted"]
    assert abs(found["fused, inverted"] - found["adapter, inverted"]) < 0.01
    bundle = ff.Bundle.load(folder / "inverted.fourierft.safetensors")
    assert [layer.shape for layer in bundle.layers] == [(128, 64), (128, 128), (10, 128)]
    assert found["bytes of the bundle"] < 4000


def check_digits_task(folder: Path, printed: str) -> None:
    before, after = map(float, re.findall(r"([\d.]+)%", printed))
    assert before < 30 < 60 < after
    assert len(ff.Bundle.load(folder / "rotated.fourierft.safetensors").layers) == 25


def check_own_trainer(folder: Path, printed: str) -> None:
    found = {
        line[:24].strip(): float(line[24:]) for line in printed.splitlines() if ":" not in line
    }
    assert found["accuracy of the bundle"] == found["accuracy of the best"]
    assert found["accuracy of the best"] > found["accuracy before"] + 0.1
    bundle = ff.Bundle.load(folder / "adapter.fourierft.safetensors")
    assert {layer.shape for layer in bundle.layers} == {(384, 384)} and len(bundle.layers) == 12
    assert set(bundle.saved) == {"classifier.bias", "classifier.weight"}
    assert found["bytes of the bundle"] < 4 * 12 * 1000 + 4 * 2 * 385 + 2000
    assert found["bytes of a checkpoint"] < 3e6  # most of it is the tokenizer


def check_runtimes(folder: Path, printed: str) -> None:
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(folder / "base")
    model, ids = adapted(base, folder / "a.fourierft.safetensors"), np.arange(12).reshape(2, 6)
    got = run(folder / "unmerged.onnx", {"input_ids": ids, "attention_mask": ids**0})
    np.testing.assert_allclose(got, model(torch.from_numpy(ids)).logits, atol=1e-4)
    errors = re.findall(r"^onnxruntime  .*torch (\S+)$", printed, re.MULTILINE)
    assert len(errors) == 5
    assert max(map(float, errors)) < 1e-4
    assert {"model.onnx", "genai_config.json"} <= {
        f.name for f in (folder / "genai-bank").iterdir()
    }


def check_signing(folder: Path, printed: str) -> None:
    for name in ("a.fourierft.safetensors", "merged"):
        assert f"{name}: signed True, verified True" in printed
        assert f"{name}: verified with one bit changed False" in printed
    assert "verify merged: True" in printed


def check_peft_settings(folder: Path, printed: str) -> None:
    plain, suggested, ours = map(float, re.findall(r"accuracy with .*: ([\d.]+)", printed))
    assert plain + 0.1 < suggested and abs(suggested - ours) < 0.06
    spec = ff.Bundle.load(folder / "adapter.fourierft.safetensors").spec
    assert f"'scaling': {spec.scaling}" in printed


GUIDES = {
    "training/peft_settings.py": check_peft_settings,
    "training/plain_loop.py": check_plain_loop,
    "training/digits_task.py": check_digits_task,
    "training/own_trainer.py": check_own_trainer,
    "own_model/train.py": check_own_model,
    "large_checkpoint/merge.py": check_large_checkpoint,
    "foreign_onnx/adapt.py": check_foreign_onnx,
    "peft_to_onnx/convert.py": check_peft_to_onnx,
    "many_tenants/serve.py": check_many_tenants,
    "runtimes/run.py": check_runtimes,
    "signing/sign.py": check_signing,
}


# Processes of its own: this one starts others, which import it again, and lets one be killed.
IN_A_PROCESS = "large_checkpoint/merge.py"
FEWER = {"training/peft_settings.py": {"EPOCHS": 3}}  # of MiniLM, three times


def check_guide(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Runs a program in this process, so that torch starts once, and checks what it wrote."""
    path = str(SAMPLES / program)
    monkeypatch.setattr(sys, "argv", [path, "-o", str(folder)])
    monkeypatch.syspath_prepend(str(Path(path).parent))
    if program == IN_A_PROCESS:
        words = [sys.executable, *sys.argv]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        GUIDES[program](folder, done.stdout)
        return
    if program in FEWER:
        main = runpy.run_path(path)["main"]
        main.__globals__.update(FEWER[program])
        main(folder)
    else:
        runpy.run_path(path, run_name="__main__")
    GUIDES[program](folder, capsys.readouterr().out)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", [name for name in GUIDES if "training" not in name])
def test_guide(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    check_guide(program, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("program", GUIDES)
def test_names_in_a_readme_exist(program: str) -> None:
    text = (SAMPLES / program).with_name("README.md").read_text("utf-8").replace("\\\n", " ")
    assert Path(program).name in text
    assert set(re.findall(r"\bff\.(\w+)", text)) <= set(ff.__all__)
    for verb, words in re.findall(r"^fourierft-export (\w+)(.*)$", text, re.MULTILINE):
        shown = CliRunner().invoke(verbs, [verb, "--help"]).output
        used = re.findall(r"(?<= )--?[a-z-]+", words)
        assert set(used) <= set(re.findall(r"--?[a-z-]+", shown)), verb
