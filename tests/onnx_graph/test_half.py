"""Exports whose weights and computation are float16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

import fourierft_export as ff
from fourierft_export.models.base_tensors import open_base
from fourierft_export.models.load import load_model
from fourierft_export.onnx_graph.trace.pretrained import export_pretrained
from fourierft_export.proof.validate import validate
from fourierft_export.spectral.delta import reference_delta

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]

MODES = ("merged", "unmerged")


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base("bert-cls")


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Callable[..., Path]) -> Path:
    return tiny_adapter("bert-cls", target_modules=["query", "value"], scaling=20.0)


@pytest.fixture(scope="module")
def bundle(adapter: Path, base: Path) -> ff.Bundle:
    return ff.from_peft(adapter, base)


@pytest.fixture(scope="module")
def files(
    bundle: ff.Bundle, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("half")
    paths = {mode: folder / f"{mode}.onnx" for mode in MODES}
    for mode, path in paths.items():
        export_pretrained(base, bundle, path, mode=mode, dtype="float16")
    return paths


def test_they_agree_with_pytorch_and_peft_to_float16s_precision(
    files: dict[str, Path], bundle: ff.Bundle, base: Path, adapter: Path
) -> None:
    report = validate(
        base=base,
        bundle=bundle,
        peft=adapter,
        onnx=list(files.values()),
        samples=8,
        threads=1,
    )
    assert report.ok, report.problems
    precisions = {side.name: side.precision for side in report.sides}
    assert {precisions[f"onnx:{mode}.onnx"] for mode in MODES} == {"float16"}


@pytest.mark.parametrize("mode", MODES)
def test_everything_in_them_is_float16(mode: str, files: dict[str, Path]) -> None:
    model = onnx.load(files[mode])
    assert {o.type.tensor_type.elem_type for o in model.graph.output} == {TensorProto.FLOAT16}
    wide = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert all(name.endswith((".spectrum", ".scaling")) for name in wide)
    assert bool(wide) == (mode == "unmerged")


def test_delta_is_added_in_float32_and_rounded_once(
    files: dict[str, Path], bundle: ff.Bundle, base: Path
) -> None:
    model = onnx.load(files["merged"])
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    stored_base = open_base(base)
    sites = places_of_weights(model)
    for layer in bundle.layers:
        delta = reference_delta(
            bundle.spectra[layer.name],
            bundle.entries(layer.name),
            stored_base.layer(layer.name).shape,
            float(bundle.spec.scaling),
        )
        half = stored_base.weight(layer.name).astype(np.float16).astype(np.float64)
        exact = half + delta
        name, transposed = sites[layer.name]
        got = stored[name].T if transposed else stored[name]
        # Half a unit in the last place of float16, and float32's share.
        bound = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64) / 2
        assert (np.abs(got.astype(np.float64) - exact) <= bound + 1e-6 * np.abs(delta).max()).all()


def places_of_weights(model: onnx.ModelProto) -> dict[str, tuple[str, bool]]:
    """Layer -> the initializer that holds its weight, and whether transposed."""
    text = next(p.value for p in model.metadata_props if p.key == "fourierft_export")
    return {
        layer: (places[0]["initializer"], places[0]["transposed"])
        for layer, places in json.loads(text)["weights"].items()
    }


def test_causal_models_with_a_cache(tiny_gpt2: Path, tmp_path: Path, run: Run) -> None:
    model = load_model(tiny_gpt2, "text-generation")
    torch.manual_seed(0)
    ff.inject(model, ff.FourierFTConfig(target_modules=["c_attn"], n_frequency=50, scaling=20.0))
    path = tmp_path / "model.onnx"
    report = export_pretrained(
        tiny_gpt2, ff.capture(model), path, mode="unmerged", dtype="float16", cache=True
    )
    assert report.inputs["past_key_values.1.key"] == ("batch", 2, "past_sequence", 16)
    ids = np.array([[1, 40, 7]])
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(3)[None],
        **{
            f"past_key_values.{i}.{kind}": np.zeros((1, 2, 0, 16), np.float16)
            for i in range(2)
            for kind in ("key", "value")
        },
    }
    found = run(path, inputs)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
    with torch.no_grad():
        want = model.double()(torch.from_numpy(ids)).logits.numpy()
    by_reference = ReferenceEvaluator(str(path)).run(["logits"], inputs)[0]
    for got in (found["logits"], by_reference):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-2 * np.abs(want).max())
