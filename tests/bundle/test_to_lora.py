"""Bundles as LoRA adapters: PEFT loads them, and its own conversion is no better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fourierft_export as ff
from fourierft_export.errors import BadInputError, UsageError
from fourierft_export.spectral.delta import reference_delta

pytestmark = pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")
QV = {"target_modules": ["query", "value"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("bert-cls", QV),
    "biases": ("bert-cls", {"target_modules": ["query"], "bias": "fourier_only"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "llama": ("llama", {"target_modules": r".*\.(q_proj|down_proj)"}),
}


def deltas(bundle: ff.Bundle) -> dict[str, np.ndarray]:
    return {
        x.name: reference_delta(
            bundle.spectra[x.name], bundle.entries(x.name), x.shape or (0, 0), bundle.spec.scaling
        )
        for x in bundle.layers
    }


def logits(model: Any) -> Any:
    import torch

    ids = torch.arange(20).reshape(2, 10) * 7 % 63 + 1
    with torch.no_grad():
        return model(input_ids=ids)[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_same_outputs_at_full_rank(
    case: str, tiny_base: Any, tiny_adapter: Any, load_peft: Callable[..., Any], tmp_path: Path
) -> None:
    kind, fields = CASES[case]
    base, adapter = tiny_base(kind), tiny_adapter(kind, **fields)
    bundle = ff.from_peft(adapter, base)
    report = ff.to_lora(bundle, tmp_path / "lora", max_error=1e-4)
    assert report.rank == max(layer.full_rank for layer in report.layers) <= 48
    assert report.error <= 1e-3
    wanted = logits(load_peft(base, adapter))
    found = logits(load_peft(base, tmp_path / "lora"))
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_a_low_rank_keeps_what_peft_keeps(
    tiny_base: Any,
    tiny_adapter: Any,
    load_peft: Callable[..., Any],
    run_verb: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """PEFT decomposes the dense delta_W."""
    from peft import convert_to_lora

    base, adapter = tiny_base("bert-cls"), tiny_adapter("bert-cls", **QV)
    bundle = ff.from_peft(adapter, base)
    path = bundle.save(tmp_path / "a.fourierft.safetensors")
    words = ["unpack", path, "--to", "lora", "--rank", 4, "-o", tmp_path / "lora"]
    ran = run_verb(*words)
    assert ran.code == 0, ran.err
    assert "much of the adapter is lost" in ran.err
    _, theirs = convert_to_lora(load_peft(base, adapter), rank=4)
    ours = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {n for n in theirs if ".lora_" in n} == {n for n in ours if ".lora_" in n}
    whole = lost = 0.0
    for layer, (name, delta) in zip(ran.json["layers"], deltas(bundle).items(), strict=True):
        errors = []
        for tensors in (ours, {n: np.asarray(t) for n, t in theirs.items()}):
            a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            assert (a.shape, b.shape) == ((4, delta.shape[1]), (delta.shape[0], 4))
            errors.append(np.sum((delta - b.astype(np.float64) @ a) ** 2))
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)
        assert layer["name"] == name
        assert layer["kept"] == pytest.approx(1 - errors[0] / np.sum(delta**2), abs=1e-5)
        assert layer["measured"] == pytest.approx(layer["kept"], abs=1e-5)
        whole, lost = whole + np.sum(delta**2), lost + errors[0]
    assert ran.json["kept"] == pytest.approx(1 - lost / whole, abs=1e-5)
    assert ran.json["error"] == pytest.approx(np.sqrt(lost / whole), abs=1e-5)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")


def test_the_largest_error_chooses_the_rank(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = ff.Bundle.load(tiny_bundle("bert-cls", **QV))
    report = ff.to_lora(bundle, tmp_path / "half", max_error=0.5)
    assert report.error <= 0.5
    fewer = ff.to_lora(bundle, tmp_path / "fewer", rank=report.rank - 1)
    assert fewer.error > 0.5
    values = [np.linalg.svd(delta, compute_uv=False) ** 2 for delta in deltas(bundle).values()]
    lost = sum(v[report.rank :].sum() for v in values) / sum(v.sum() for v in values)
    assert report.error == pytest.approx(np.sqrt(lost), abs=1e-5)


def test_what_is_refused(
    tiny_base: Any, tiny_adapter: Any, run_verb: Callable[..., Any], tmp_path: Path
) -> None:
    base, adapter = tiny_base("bert"), tiny_adapter("bert", target_modules=["query"])
    out = ["-o", tmp_path / "out"]
    for words in (
        [],
        ["--rank", 0],
        ["--rank", 10**8],
        ["--max-error", 1],
        ["--rank", 2, "--max-error", 0.5],
    ):
        assert run_verb("unpack", adapter, "--base", base, "--to", "lora", *words, *out).code == 2
    assert run_verb("unpack", adapter, "--rank", 2, *out).code == 2
    ran = run_verb("unpack", adapter, "--to", "lora", "--rank", 2, *out)  # which shapes?
    assert (ran.code, ran.json["error"]["expected"]) == (3, "a bound bundle")
    with pytest.raises(BadInputError, match="a bound bundle"):
        ff.to_lora(ff.from_peft(adapter), tmp_path / "out", rank=2)
    with pytest.raises(UsageError, match="found neither"):
        ff.to_lora(ff.from_peft(adapter, base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    words = ["unpack", adapter, "--base", base, "--to", "lora", "--rank", 2, *out]
    assert run_verb(*words).code == 0
    assert run_verb(*words).code == 2
