"""Bundles and checkpoints without torch, delta_W by its definition, and processes to be killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import fourierft_export as ff
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.files.checkpoint import Checkpoint
from tests.kill import Forks

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., ff.Bundle]:
    """`make(base, modules, ...)`: a bundle with random normal spectra, bound by default."""

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
    ) -> ff.Bundle:
        random = np.random.default_rng(numpy_seed)
        layers = tuple(LayerSpec(name, n_frequency) for name in modules)
        spectra = {name: random.standard_normal(n_frequency, np.float32) for name in modules}
        spec = AdapterSpec(seed, scaling, layers, task_type=task_type)
        bundle = ff.Bundle.build(spec, spectra, saved)
        return bundle.bind(base) if bound else bundle

    return make


@pytest.fixture(scope="session")
def exact_delta() -> Callable[[ff.Bundle, str], Array]:
    """delta_W in float64, straight from its definition; shares no code with the package.

    delta_W[p, q] = s/(M N) * sum_k c_k cos(2 pi (u_k p / M + v_k q / N)), as two products.
    """

    def delta(bundle: ff.Bundle, layer: str) -> Array:
        rows, columns = bundle.layer(layer).shape or (0, 0)
        entries = bundle.entries(layer)
        c = bundle.spectra[layer].astype(np.float64)
        p = 2 * np.pi / rows * (np.outer(np.arange(rows), entries[:, 0]) % rows)
        q = 2 * np.pi / columns * (np.outer(entries[:, 1], np.arange(columns)) % columns)
        total = (np.cos(p) * c) @ np.cos(q) - (np.sin(p) * c) @ np.sin(q)
        return np.asarray(total * (float(bundle.spec.scaling) / (rows * columns)))

    return delta


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Path], dict[str, Array]]:
    """Every tensor of a checkpoint, by name."""

    def read(path: Path) -> dict[str, Array]:
        checkpoint = Checkpoint.open(path)
        return {name: checkpoint.read(name) for name in checkpoint.tensors}

    return read


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """The command line in forks of one warm process, killed on demand."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    made = Forks()
    yield made
    made.close()
