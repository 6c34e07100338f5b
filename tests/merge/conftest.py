"""Bundles without torch, PEFT adapters of causal models, and delta_W by its definition."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.files.checkpoint import Checkpoint

Array = np.ndarray[Any, Any]


@pytest.fixture
def make_bundle() -> Callable[..., Bundle]:
    """`make(base, modules, ...)`: a bundle with random normal spectra, bound unless told not to."""

    def make(
        base: Path,
        modules: list[str],
        *,
        seed: int = 777,
        n_frequency: int = 16,
        scaling: float = 50.0,
        numpy_seed: int = 0,
        task_type: str | None = None,
        saved: Mapping[str, Array] | None = None,
        bound: bool = True,
    ) -> Bundle:
        random = np.random.default_rng(numpy_seed)
        layers = tuple(LayerSpec(name, n_frequency) for name in modules)
        spectra = {name: random.standard_normal(n_frequency, np.float32) for name in modules}
        spec = AdapterSpec(seed, scaling, layers, task_type=task_type)
        bundle = Bundle.build(spec, spectra, saved)
        return bundle.bind(base) if bound else bundle

    return make


@pytest.fixture
def exact_delta() -> Callable[[Bundle, str], Array]:
    """delta_W in float64, straight from its definition; shares no code with the package.

    delta_W[p, q] = s/(M N) * sum_k c_k cos(2 pi (u_k p / M + v_k q / N)), as two products.
    """

    def delta(bundle: Bundle, layer: str) -> Array:
        rows, columns = bundle.layer(layer).shape or (0, 0)
        entries = bundle.entries(layer)
        c = bundle.spectra[layer].astype(np.float64)
        p = 2 * np.pi / rows * (np.outer(np.arange(rows), entries[:, 0]) % rows)
        q = 2 * np.pi / columns * (np.outer(entries[:, 1], np.arange(columns)) % columns)
        total = (np.cos(p) * c) @ np.cos(q) - (np.sin(p) * c) @ np.sin(q)
        return np.asarray(total * (float(bundle.spec.scaling) / (rows * columns)))

    return delta


@pytest.fixture
def tensors_of() -> Callable[[Path], dict[str, Array]]:
    """Every tensor of a checkpoint, by name."""

    def read(path: Path) -> dict[str, Array]:
        checkpoint = Checkpoint.open(path)
        return {name: checkpoint.read(name) for name in checkpoint.tensors}

    return read


@pytest.fixture
def peft_causal(tmp_path: Path) -> Callable[..., Path]:
    """`make(base, **fields)`: an adapter of a causal model, saved by PEFT itself."""

    def make(base: Path, **fields: Any) -> Path:
        import torch
        from peft import FourierFTConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        defaults = {"task_type": "CAUSAL_LM", "n_frequency": 200, "scaling": 20.0}
        peft_model = get_peft_model(model, FourierFTConfig(**(defaults | fields)))
        peft_model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft"

    return make


@pytest.fixture
def load_peft_causal() -> Callable[[Path, Path], Any]:
    """`load(base, adapter)`: PEFT's own model, unmerged, in eval mode."""

    def load(base: Path, adapter: Path) -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()

    return load


@pytest.fixture
def make_base() -> Callable[..., Path]:
    """`make(folder, shards=4, size=128)`: a checkpoint of layers "layers.I.q" and "layers.I.k"."""

    def make(folder: Path, shards: int = 4, size: int = 128, dtype: Any = np.float32) -> Path:
        random = np.random.default_rng(0)
        folder.mkdir()
        weight_map = {}
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            tensors = {
                f"layers.{number}.{part}.weight": (random.standard_normal((size, size)) * 0.02)
                .astype(dtype) for part in ("q", "k")
            }  # fmt: skip
            save_file(tensors, folder / name, {"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, name))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text('{"model_type": "made"}')
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of every file below a folder, by its relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        paths = (p for p in folder.rglob("*") if p.is_file())
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}

    return read
