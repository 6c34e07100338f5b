"""Small models, and ONNX Runtime to run what was exported of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest


def run_onnx(path: Path, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name, from ONNX Runtime on the CPU."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), quiet_options(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def quiet_options() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


@pytest.fixture(scope="session")
def run() -> Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]:
    return run_onnx


@pytest.fixture(scope="session")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], onnx.ModelProto]:
    """`folded(path)`: the model as ONNX Runtime has it once it is loaded."""
    import onnxruntime as ort

    def load(path: Path) -> onnx.ModelProto:
        options = quiet_options()
        out = tmp_path_factory.mktemp("folded") / "model.onnx"
        options.optimized_model_filepath = str(out)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(out)

    return load


@pytest.fixture(scope="session")
def node_list() -> Callable[[onnx.ModelProto], list[tuple[object, ...]]]:
    """`node_list(model)`: every node with all that it has, but what its weights are called."""

    def nodes(model: onnx.ModelProto) -> list[tuple[object, ...]]:
        constants = {tensor.name for tensor in model.graph.initializer}
        return [
            (
                node.domain,
                node.op_type,
                node.name,
                tuple("*" if name in constants else name for name in node.input),
                tuple(node.output),
                tuple(attribute.SerializeToString() for attribute in node.attribute),
            )
            for node in model.graph.node
        ]

    return nodes


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Any]:
    """`make(layers, weights=None, saved=None, n=12, seed=7, scaling=9.0)`: random-normal spectra.

    With `weights` (layer -> (out, in) array) the bundle is bound to them, otherwise unbound.
    """
    from fourierft_export.bundle.file import Bundle
    from fourierft_export.bundle.fingerprint import fingerprint
    from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
    from fourierft_export.spectral.entries import entries_sha256, spectral_entries

    def make(
        layers: list[str],
        weights: dict[str, np.ndarray] | None = None,
        saved: dict[str, np.ndarray] | None = None,
        n: int = 12,
        seed: int = 7,
        scaling: float = 9.0,
    ) -> Bundle:
        rng = np.random.default_rng(seed)
        specs = []
        for name in layers:
            if weights is None:
                specs.append(LayerSpec(name, n))
                continue
            shape = weights[name].shape
            digest = entries_sha256(spectral_entries(seed, shape, n, "small"))
            mark = fingerprint(weights[name])
            specs.append(LayerSpec(name, n, shape, False, "small", digest, mark))
        spectra = {name: rng.standard_normal(n).astype(np.float32) for name in layers}
        return Bundle.build(AdapterSpec(seed, scaling, tuple(specs)), spectra, saved)

    return make


@pytest.fixture(scope="session")
def exact_delta() -> Callable[..., np.ndarray]:
    """`delta(bundle, layer, shape)`: delta_W in float64, straight from its definition."""
    from fourierft_export.spectral.delta import reference_delta
    from fourierft_export.spectral.entries import spectral_entries

    def delta(bundle: Any, layer: str, shape: tuple[int, int]) -> np.ndarray:
        spectrum = bundle.spectra[layer]
        entries = spectral_entries(bundle.spec.entry_seed, shape, len(spectrum), "small")
        return reference_delta(spectrum, entries, shape, bundle.spec.scaling)

    return delta
