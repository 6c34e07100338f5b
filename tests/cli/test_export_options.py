"""What `export` can be asked for beyond its mode, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import fourierft_export as ff
from fourierft_export.cli.main import run


@pytest.fixture
def gpt2_bundle(tiny_gpt2: Path, tmp_path: Path) -> Path:
    from fourierft_export.models.load import load_model

    torch.manual_seed(0)
    model = load_model(tiny_gpt2, "text-generation")
    ff.inject(model, ff.FourierFTConfig(target_modules=["c_attn"], n_frequency=50))
    path = tmp_path / "b.fourierft.safetensors"
    ff.capture(model).save(path)
    return path


def test_cache_precision_and_versions(
    tiny_gpt2: Path, gpt2_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    words = ["export", "--base", str(tiny_gpt2), "--bundle", str(gpt2_bundle), "-o", str(out)]
    words += ["--mode", "unmerged", "--cache", "--dtype", "float16", "--inline"]
    words += ["--opset", "19", "--ir-version", "9", "--json"]
    assert run(words) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)["export"]
    assert facts["opset"] == 19
    assert facts["inputs"]["past_key_values.1.value"] == ["batch", 2, "past_sequence", 16]
    assert "present.1.value" in facts["outputs"]
    model = onnx.load(out)
    assert (model.ir_version, len(model.functions)) == (9, 0)
    kinds = {output.type.tensor_type.elem_type for output in model.graph.output}
    assert kinds == {TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--opset", "17"], "18 to 25"),
        (["--ir-version", "3"], "ir_version"),
        (["--task", "feature-extraction", "--cache"], "text-generation"),
        (["--task", "translation"], "seq2seq-encoder"),
    ],
)
def test_what_cannot_be(
    more: list[str],
    words: str,
    tiny_gpt2: Path,
    gpt2_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model.onnx"
    given = ["--base", str(tiny_gpt2), "--bundle", str(gpt2_bundle), "-o", str(out)]
    assert run(["export", *given, "--mode", "unmerged", *more]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_images_are_validated_with_images_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    ff.inject(model, ff.FourierFTConfig(target_modules=["q_proj", "fc1"], n_frequency=20))
    ff.capture(model).save(tmp_path / "b.fourierft.safetensors")
    out, images = tmp_path / "model.onnx", tmp_path / "images.npz"
    pair = ["--base", str(tmp_path / "base"), "--bundle", str(tmp_path / "b.fourierft.safetensors")]
    assert run(["export", *pair, "--mode", "unmerged", "-o", str(out)]) == 0
    np.savez(images, pixel_values=np.random.default_rng(0).normal(size=(5, 3, 8, 8)))
    assert run(["validate", *pair, "--onnx", str(out)]) == 2
    assert "pixel_values" in capsys.readouterr().err
    assert run(["validate", *pair, "--onnx", str(out), "--inputs", str(images)]) == 0
