"""How small bundles are, with the layer names of real models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fourierft_export import Bundle, from_peft
from fourierft_export.bundle.spec import Fingerprint, LayerSpec
from fourierft_export.spectral.entries import entries_sha256, spectral_entries

ROBERTA = [
    f"roberta.encoder.layer.{i}.attention.self.{p}" for i in range(12) for p in ("query", "value")
]
LLAMA = [f"model.layers.{i}.self_attn.{p}" for i in range(32) for p in ("q_proj", "v_proj")]
# The config as PEFT 0.18 saves it, all 19 keys.
NONE = ("auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform", "revision")
CONFIG: dict[str, Any] = dict.fromkeys((*NONE, "modules_to_save")) | {
    "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_weights": False,
    "n_frequency_pattern": {}, "peft_type": "FOURIERFT", "peft_version": "0.18.0",
    "random_loc_seed": 777, "scaling": 150.0,
}  # fmt: skip
BERT_FIELDS = ("FacebookAI/roberta-base", "SEQ_CLS", ["query", "value"])
LLAMA_FIELDS = ("meta-llama/Llama-2-7b-hf", "CAUSAL_LM", ["q_proj", "v_proj"])
CASES = {
    "RoBERTa-base, n 200": (ROBERTA, 200, (768, 768), BERT_FIELDS, 20_400, 1_200),
    "RoBERTa-base, n 1000": (ROBERTA, 1000, (768, 768), BERT_FIELDS, 97_200, 1_200),
    "Llama-2-7B, n 1000": (LLAMA, 1000, (4096, 4096), LLAMA_FIELDS, 258_000, 2_000),
}


@pytest.mark.parametrize(
    ("names", "n", "shape", "fields", "limit", "overhead"), CASES.values(), ids=CASES.keys()
)
def test_sizes(
    names: list[str],
    n: int,
    shape: tuple[int, int],
    fields: tuple[str, str, list[str]],
    limit: int,
    overhead: int,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    keys = ("base_model_name_or_path", "task_type", "target_modules")
    config = CONFIG | dict(zip(keys, fields, strict=True)) | {"n_frequency": n}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    tensors = {
        f"base_model.model.{name}.fourierft_spectrum": rng.standard_normal(n).astype(np.float32)
        for name in names
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    theirs = sum(path.stat().st_size for path in tmp_path.iterdir())
    bundle, raw = from_peft(tmp_path), 4 * n * len(names)
    size = len(bundle.to_bytes())
    assert size <= min(raw + overhead, limit)
    assert size - raw < (theirs - raw) / 3
    assert dict(Bundle.from_bytes(bundle.to_bytes()).spec.peft_config) == config

    digest = entries_sha256(spectral_entries(777, shape, n, "small"))
    bound = tuple(
        LayerSpec(
            layer.name, n, shape, False, "small", digest,
            Fingerprint("F32", rng.bytes(16), rng.bytes(16)),
        )
        for layer in bundle.layers
    )  # fmt: skip
    size = len(replace(bundle, spec=replace(bundle.spec, layers=bound)).to_bytes())
    assert size <= raw + 40 * len(names) + overhead
    assert size <= limit + 32 * len(names)
