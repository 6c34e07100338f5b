"""Adapters of the paper's own code, against its formula in float64; other PEFT adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourierft_export as ff
from fourierft_export.cli.main import run

SIZE, N, SCALING = 24, 40, 110.0
LAYERS = ("encoder.0.query", "encoder.0.value")


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a state dict as the paper's code names its tensors."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}", "utf-8")
    weights = {f"{name}.weight": torch.randn(SIZE, SIZE) for name in LAYERS}
    weights["encoder.0.oblong.weight"] = torch.randn(SIZE, 2 * SIZE)
    weights["classifier.weight"] = torch.randn(3, SIZE)
    save_file(weights, base / "model.safetensors")
    state = {f"base_model.model.{name}.spectrum.default": torch.randn(N) for name in LAYERS}
    for name in LAYERS:
        state[f"base_model.model.{name}.base_layer.weight"] = weights[f"{name}.weight"]
    state["base_model.model.classifier.original_module.weight"] = weights["classifier.weight"]
    state["base_model.model.classifier.modules_to_save.default.weight"] = torch.randn(3, SIZE)
    save_file(state, tmp_path / "state.safetensors")
    return base, tmp_path / "state.safetensors"


@pytest.mark.parametrize("seed", [2024, 5])
def test_merged_layers_compute_what_the_papers_forward_does(
    trained: tuple[Path, Path], tmp_path: Path, seed: int
) -> None:
    base, path = trained
    bundle, merged = tmp_path / "a.fourierft.safetensors", tmp_path / "merged"
    options = ["--paper-scaling", str(SCALING), "--base", str(base)]
    options += [] if seed == 2024 else ["--paper-seed", str(seed)]
    assert run(["pack", str(path), *options, "-o", str(bundle)]) == 0
    assert run(["merge", "--base", str(base), "--bundle", str(bundle), "-o", str(merged)]) == 0
    state, found = load_file(path), load_file(merged / "model.safetensors")
    x = torch.randn(5, SIZE, dtype=torch.float64)
    places = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(seed))[:N]
    for name in LAYERS:
        dense = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        dense[places // SIZE, places % SIZE] = state[
            f"base_model.model.{name}.spectrum.default"
        ].double()
        weight = state[f"base_model.model.{name}.base_layer.weight"].double()
        change = torch.fft.ifft2(dense).real * SCALING
        want = x @ weight.T + torch.einsum("ik,kl->il", x, change)
        torch.testing.assert_close(
            x @ found[f"{name}.weight"].double().T, want, rtol=1e-5, atol=1e-5
        )
    head = state["base_model.model.classifier.modules_to_save.default.weight"]
    assert torch.equal(found["classifier.weight"], head)


def test_what_cannot_be_read_is_named(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, path = trained
    out = ["-o", str(tmp_path / "a.fourierft.safetensors")]
    assert run(["pack", str(path), "--paper-scaling", "1", *out]) == 2
    assert "no --base" in capsys.readouterr().err
    based = ["--base", str(base), *out]
    assert run(["pack", str(path), "--paper-seed", "1", *based]) == 2
    assert run(["pack", str(path), "--paper-scaling", "1", "--adapter", "other", *based]) == 3
    assert ".spectrum.other" in capsys.readouterr().err
    spectrum = {"base_model.model.encoder.0.oblong.spectrum.default": torch.randn(3)}
    save_file(spectrum, tmp_path / "oblong.safetensors")
    oblong = str(tmp_path / "oblong.safetensors")
    assert run(["pack", oblong, "--paper-scaling", "1", *based]) == 3
    assert "square layers" in capsys.readouterr().err


def test_an_adapter_of_another_kind_is_described_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config = peft.WaveFTConfig(target_modules=["0"], n_frequency=7, wavelet_family="db1")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "wave")
    written = json.loads((tmp_path / "wave/adapter_config.json").read_text("utf-8"))
    assert written["peft_type"] == "WAVEFT"
    with pytest.raises(ff.errors.BadInputError, match=r"WAVEFT.*n_frequency 7.*wavelet_family db1"):
        ff.from_peft(tmp_path / "wave")
    assert run(["inspect", str(tmp_path / "wave")]) == 3
    assert "merge it with PEFT" in capsys.readouterr().err
