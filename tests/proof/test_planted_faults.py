"""Every fault that the validation exists for is planted, found and explained; clean sets pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fourierft_export as ff
from fourierft_export.errors import UsageError, ValidationError
from fourierft_export.spectral.entries import spectral_entries

FIRST, LAST = (f"bert.encoder.layer.{n}.attention.self" for n in (0, 1))
FAULTS = {
    # fault: the cause that is named, the first layer that differs, a piece of what is said
    "adapter zeroed": ("left out", f"{FIRST}.query", "was left out"),
    "layer left out": ("left out", f"{LAST}.value", "was left out"),
    "layer twice": ("twice", f"{LAST}.value", "added twice"),
    "scaling * 1.01": ("scaling", f"{FIRST}.query", "delta_W is 1.0"),
    "delta transposed": ("transposed", f"{FIRST}.query", "transposed"),
    "seed + 1": ("seed", f"{FIRST}.query", "seed 778 instead of 777"),
    "seed + 5000": ("seed", f"{FIRST}.query", "another seed or entry rule"),
    "entry rule": ("entry rule", f"{FIRST}.query", "rule 'r64'"),
    "rounded": ("precision", f"{FIRST}.query", "rounded to bfloat16"),
    "layer rounded": ("precision", f"{LAST}.value", "rounded to bfloat16"),
    "base rounded": ("precision", f"{FIRST}.query", "W is rounded to bfloat16 before"),
    # Coefficients rounded to float16 stay within what rounding explains, and pass.
    "spectrum rounded": ("precision", f"{FIRST}.query", "coefficients are rounded to bfloat16"),
    "another adapter": ("adapter", f"{FIRST}.query", "other coefficients at the same entries"),
    "layer added": ("added", f"{LAST}.key", "a layer added"),
    "another base": ("base", f"{LAST}.value", "another base"),
    "another embedding": ("base", "", ""),
    "head dropped": ("head", "classifier", "its head is missing"),
    "another head": ("head", "classifier", "another one is there"),
    "head * 1.01": ("head", "classifier", "head times 1.01"),
}
CORE = ("adapter zeroed", "head dropped", "delta transposed", "seed + 1", "scaling * 1.01")
Plant = Callable[..., Path]


def check_cause(report: Any, side: str, fault: str) -> None:
    kind, layer, text = FAULTS[fault]
    (cause,) = (one for one in report.causes if one.side == side)
    assert (cause.kind, text in cause.text) == (kind, True), str(cause)
    assert cause.layer == layer or not layer


def test_a_clean_set_passes(classifier: Any, plant: Plant, clean_onnx: Path) -> None:
    base, adapter, bundle = classifier
    report = ff.validate(base=base, bundle=bundle, peft=adapter, merged=plant(), onnx=clean_onnx)
    report.raise_for_failure()
    names = ["torch", "peft", "merged", "onnx:clean.onnx"]
    assert [side.name for side in report.sides] == ["base", *names]
    equal = {(pair.left, pair.right) for pair in report.comparisons if pair.expect == "equal"}
    assert len(equal) == 6  # every pair of the four adapted sides
    different = {(pair.left, pair.right) for pair in report.comparisons if pair.expect != "equal"}
    assert different == {("base", name) for name in names}
    assert report.notes == report.causes == ()
    assert "causes" not in report.to_dict()


# A merged folder with all of its adapted weights rounded is one of that precision, and is clean.
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "rounded"])
def test_a_fault_in_a_merged_directory(classifier: Any, plant: Plant, fault: str) -> None:
    report = ff.validate(base=classifier.base, bundle=classifier.bundle, merged=plant(fault))
    with pytest.raises(ValidationError) as caught:
        report.raise_for_failure()
    assert caught.value.exit_code == 5
    assert caught.value.where == "torch against merged, output logits"
    assert "; likely cause: merged: " in caught.value.found
    failing = {(pair.left, pair.right) for pair in report.failing}
    unchanged = {("base", "merged")} if fault == "adapter zeroed" else set()
    assert failing == {("torch", "merged")} | unchanged
    check_cause(report, "merged", fault)
    if fault == "another embedding":
        assert report.causes[0].layer == "bert.embeddings.word_embeddings"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_onnx_file(
    classifier: Any, plant: Plant, plant_onnx: Callable[[str], Path], fault: str
) -> None:
    file = plant_onnx(fault)
    report = ff.validate(
        base=classifier.base, bundle=classifier.bundle, merged=plant(), onnx=[file]
    )
    with pytest.raises(ValidationError) as caught:
        report.raise_for_failure()
    assert caught.value.where == "torch against onnx:planted.onnx, output logits"
    assert report.suspects == ("onnx:planted.onnx",)
    assert "onnx:planted.onnx" in caught.value.remedy
    check_cause(report, "onnx:planted.onnx", fault)


# A PEFT folder holds no base (so neither another nor a rounded one) and only sums of cosines as
# delta_W (so no rounded W + delta_W). Its entry rule is that of the torch that runs it: this fault
# and a transposed delta_W are planted as a folder with a coefficient for every entry.
NOT_IN_PEFT = {"another base", "another embedding", "base rounded", "rounded", "layer rounded"}


def plant_peft(adapter: Path, fault: str, out: Path) -> Path:
    """Writes a PEFT folder with a planted fault."""
    shutil.copytree(adapter, out)
    config = out / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["random_loc_seed"] += {"seed + 1": 1, "seed + 5000": 5000}.get(fault, 0)
    fields["scaling"] *= 1 + 0.01 * (fault == "scaling * 1.01")
    tensors, draw = {}, torch.Generator().manual_seed(5)
    last = f"base_model.model.{LAST}.value.fourierft_spectrum"
    for name, value in load_file(out / "adapter_model.safetensors").items():
        if "spectrum" in name:
            other = torch.randn(value.shape, generator=draw)
            value = {
                "adapter zeroed": value * 0,
                "another adapter": other,
                "spectrum rounded": value.bfloat16().float(),
                "layer twice": value * (1 + (name == last)),
                "delta transposed": every_entry(value, "small", transposed=True),
                "entry rule": every_entry(value, "r64", transposed=False),
            }.get(fault, value)
            fields["n_frequency"] = len(value)
        elif fault.endswith(("head", "head * 1.01")):
            value = value * 1.01 if fault == "head * 1.01" else value + 1
        tensors[name] = value
    if fault == "layer left out":
        del tensors[last]
    if fault == "layer added":
        tensors[last.replace("value", "key")] = tensors[last].clone()
    if fault == "head dropped":
        tensors = {name: value for name, value in tensors.items() if "spectrum" in name}
    if fault.startswith("layer"):
        names = [name for name in tensors if "spectrum" in name]
        fields["target_modules"] = [name.split(".", 2)[2].rpartition(".")[0] for name in names]
    config.write_text(json.dumps(fields))
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def every_entry(spectrum: torch.Tensor, rule: str, *, transposed: bool) -> torch.Tensor:
    """The coefficients of a 32x32 layer's entries, in the order in which PEFT draws all entries."""
    seed, shape = 777, (32, 32)
    dense = np.zeros(shape, np.float32)
    dense[tuple(spectral_entries(seed, shape, len(spectrum), rule).T)] = spectrum
    places = spectral_entries(seed, shape, dense.size, "small").T
    return torch.from_numpy((dense.T if transposed else dense)[tuple(places)])


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in NOT_IN_PEFT])
def test_a_fault_in_a_peft_directory(classifier: Any, tmp_path: Path, fault: str) -> None:
    folder = plant_peft(classifier.adapter, fault, tmp_path / "peft")
    options = {"base": classifier.base, "bundle": classifier.bundle}
    if fault == "head dropped":  # PEFT would run with a random one
        with pytest.raises(UsageError, match=r"neither has classifier\.bias, classifier\.weight"):
            ff.validate(**options, peft=folder)
        return
    report = ff.validate(**options, peft=folder)
    assert [(p.left, p.right) for p in report.failing][:1] == [("torch", "peft")]
    check_cause(report, "peft", fault)


def test_a_tied_embedding_that_was_changed_with_the_head(
    tiny_model: Callable[[str], Any], tiny_base: Any, tiny_adapter: Any, tmp_path: Path
) -> None:
    adapter = tiny_adapter("llama-tied", target_modules=["lm_head"])
    model = ff.unload(ff.attach(tiny_model("llama-tied"), adapter), merge=True)
    model.model.embed_tokens.weight = model.lm_head.weight
    model.save_pretrained(tmp_path)
    base = tiny_base("llama-tied")
    report = ff.validate(base=base, bundle=adapter, merged=tmp_path, samples=8)
    assert [(one.kind, one.layer) for one in report.causes] == [("tied", "model.embed_tokens")]


@pytest.mark.parametrize("fault", CORE)
def test_a_fault_is_found_without_the_bundle(
    classifier: Any, plant: Plant, clean_onnx: Path, fault: str
) -> None:
    """PEFT and the graph are enough to convict a merged directory."""
    report = ff.validate(
        base=classifier.base, peft=classifier.adapter, merged=plant(fault), onnx=clean_onnx
    )
    assert not report.ok and report.suspects == ("merged",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merges_in_half_precision(
    classifier: Any, plant: Plant, clean_onnx: Path, dtype: torch.dtype
) -> None:
    """A hundredth of the delta is far below bfloat16's rounding: like is compared with like."""
    options = {"base": classifier.base, "bundle": classifier.bundle}
    report = ff.validate(**options, merged=plant(dtype=dtype), onnx=clean_onnx)
    report.raise_for_failure()
    precision = str(dtype).removeprefix("torch.")
    by_name = {side.name: side for side in report.sides}
    assert by_name["merged"].precision == precision and f"torch:{precision}" in by_name
    for fault in CORE:
        report = ff.validate(**options, merged=plant(fault, dtype))
        assert (f"torch:{precision}", "merged") in {(p.left, p.right) for p in report.failing}
        check_cause(report, "merged", fault)


def test_a_folder_is_validated_with_its_onnx_files(
    classifier: Any, clean_onnx: Path, tmp_path: Path, run_verb: Callable[..., Any]
) -> None:
    base, _, bundle = classifier
    shutil.copytree(base, tmp_path / "base")
    bundle.save(tmp_path / "a.fourierft.safetensors")
    ff.merge_checkpoint(tmp_path / "base", bundle, tmp_path / "merged")
    ff.export_pretrained(base, bundle, tmp_path / "a.onnx", mode="merged")
    shutil.copy(clean_onnx, tmp_path / "of nobody.onnx")  # no metadata says whose it is
    (tmp_path / "damaged.onnx").write_bytes(b"x" * 100)
    report = run_verb("validate", tmp_path / "merged", "--samples", 4).json["validate"]
    names = [side["name"] for side in report["sides"]]
    assert names == ["base", "torch", "merged", "onnx:a.onnx"] and report["ok"]
