"""How small bundles are: the figures this format was made for, on real models' layer names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fourierft_export import Bundle, from_peft
from fourierft_export.bundle.spec import AdapterSpec, Fingerprint, LayerSpec
from fourierft_export.spectral.entries import entries_sha256, spectral_entries

FINGERPRINT_LIMIT = 40  # bytes a layer

ROBERTA = [
    f"roberta.encoder.layer.{i}.attention.self.{p}" for i in range(12) for p in ("query", "value")
]
LLAMA = [f"model.layers.{i}.self_attn.{p}" for i in range(32) for p in ("q_proj", "v_proj")]


def peft_config(base: str, task: str, n: int, modules: list[str]) -> dict[str, Any]:
    """All 19 keys, as PEFT 0.18 saves them."""
    none = ("auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform")
    return dict.fromkeys((*none, "modules_to_save", "revision")) | {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": False,
        "n_frequency": n,
        "n_frequency_pattern": {},
        "peft_type": "FOURIERFT",
        "peft_version": "0.18.0",
        "random_loc_seed": 777,
        "scaling": 150.0,
        "target_modules": modules,
        "task_type": task,
    }


def adapter(
    names: list[str], n: int, shape: tuple[int, int] | None, config: dict[str, Any]
) -> Bundle:
    """An adapter of these layers; bound, with fingerprints, where a shape is given."""
    rng = np.random.default_rng(0)
    layers = [LayerSpec(name, n) for name in names]
    if shape is not None:
        digest = entries_sha256(spectral_entries(777, shape, n, "small"))
        layers = [
            LayerSpec(name, n, shape, False, "small", digest, Fingerprint("F32", *rng_bytes(rng)))
            for name in names
        ]
    base, task = config["base_model_name_or_path"], config["task_type"]
    spec = AdapterSpec(777, 150.0, tuple(layers), task, base, config)
    return Bundle.build(spec, {m: rng.standard_normal(n).astype(np.float32) for m in names})


def rng_bytes(rng: np.random.Generator) -> tuple[bytes, bytes]:
    return rng.bytes(16), rng.bytes(16)


CASES = {
    "RoBERTa-base, n 200": (ROBERTA, 200, (768, 768), 20_400, 1_200),
    "RoBERTa-base, n 1000": (ROBERTA, 1000, (768, 768), 97_200, 1_200),
    "Llama-2-7B, n 1000": (LLAMA, 1000, (4096, 4096), 258_000, 2_000),
}


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize(
    ("names", "n", "shape", "limit", "overhead"), CASES.values(), ids=CASES.keys()
)
def test_sizes(
    names: list[str], n: int, shape: tuple[int, int], limit: int, overhead: int, bound: bool
) -> None:
    llama = names is LLAMA
    base = "meta-llama/Llama-2-7b-hf" if llama else "FacebookAI/roberta-base"
    modules = ["q_proj", "v_proj"] if llama else ["query", "value"]
    config = peft_config(base, "CAUSAL_LM" if llama else "SEQ_CLS", n, modules)
    bundle = adapter(names, n, shape if bound else None, config)
    size, raw = len(bundle.to_bytes()), 4 * n * len(names)
    prints = FINGERPRINT_LIMIT * len(names) if bound else 0
    assert size <= raw + prints + overhead
    if not bound:
        assert size <= limit
    # Fingerprints, at 32 bytes a layer, fit under the bar of the longer adapters, too.
    assert size <= limit + (len(names) * 32 if bound else 0)
    assert dict(Bundle.from_bytes(bundle.to_bytes()).spec.peft_config) == config


@pytest.mark.parametrize(("names", "n"), [(ROBERTA, 200), (ROBERTA, 1000), (LLAMA, 1000)])
def test_smaller_than_what_peft_saves(names: list[str], n: int, tmp_path: Path) -> None:
    config = peft_config("some/base", "SEQ_CLS", n, ["a", "b"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    spectra = {f"base_model.model.{m}.fourierft_spectrum": np.ones(n, np.float32) for m in names}
    save_file(spectra, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    theirs = sum(path.stat().st_size for path in tmp_path.iterdir())
    ours = len(from_peft(tmp_path).to_bytes())
    raw = 4 * n * len(names)
    assert ours - raw < (theirs - raw) / 3


def test_explicit_entries_cost_what_they_are() -> None:
    entries = spectral_entries(1, (64, 64), 500, "small")
    layer = LayerSpec("a", 500, (64, 64), False, "explicit", entries_sha256(entries))
    spectra = {"a": np.ones(500, np.float32)}
    bundle = Bundle.build(AdapterSpec(1, 1.0, (layer,)), spectra, {}, {"a": entries})
    assert len(bundle.to_bytes()) < 500 * 4 + 500 * 8 + 600
