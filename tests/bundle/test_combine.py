"""Bundles combined without a model: entries, dtypes and scalings, against the double sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fourierft_export import Bundle
from fourierft_export.bundle.combine import combine_bundles
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.spectral.delta import reference_delta
from fourierft_export.spectral.entries import entries_sha256, spectral_entries

SHAPE = (6, 8)


def bundle(
    seed: int = 1,
    n: int = 10,
    scaling: float = 2.0,
    dtype: Any = np.float32,
    layers: tuple[str, ...] = ("x", "y"),
) -> Bundle:
    draw = np.random.default_rng(seed * 100 + n)
    digest = entries_sha256(spectral_entries(seed, SHAPE, n))
    specs = tuple(LayerSpec(name, n, SHAPE, False, "small", digest) for name in layers)
    spectra = {name: draw.standard_normal(n).astype(dtype) for name in layers}
    return Bundle.build(AdapterSpec(seed, scaling, specs), spectra)


def combined(bundles: list[Bundle], weights: list[float] | None = None) -> Bundle:
    return combine_bundles({str(i): one for i, one in enumerate(bundles)}, weights)


def delta(one: Bundle, layer: str) -> Any:
    if layer not in one.spectra:
        return 0.0
    return reference_delta(one.spectra[layer], one.entries(layer), SHAPE, one.spec.scaling)


def assert_sum(found: Bundle, bundles: list[Bundle], weights: list[float]) -> None:
    for layer in found.layers:
        wanted = sum(w * delta(b, layer.name) for b, w in zip(bundles, weights, strict=True))
        error = np.linalg.norm(delta(found, layer.name) - wanted)
        assert error <= 1e-6 * np.linalg.norm(wanted)
    assert {m.name for m in found.layers} == {m.name for b in bundles for m in b.layers}


@pytest.mark.parametrize("scaling", [2.0, -3, 0.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_dtypes_and_scalings(dtype: Any, scaling: float) -> None:
    bundles = [bundle(scaling=scaling), bundle(n=5, dtype=dtype), bundle(seed=2, layers=("y",))]
    found = combined(bundles, [0.5, 2.0, -1.0])
    assert_sum(found, bundles, [0.5, 2.0, -1.0])
    wide = np.float64 if dtype == np.float64 else np.float32
    assert found.spectra["x"].dtype == wide
    assert {m.name: m.entry_rule for m in found.layers} == {"x": "small", "y": "explicit"}
    again = [found, bundle(seed=3)]  # explicit ones combine, too
    assert_sum(combined(again, [1, 1]), again, [1, 1])
    assert_sum(combined([found, found], [1, 0.5]), [found, found], [1, 0.5])


def test_weights_are_one_by_default_and_scale_a_single_bundle() -> None:
    one = bundle()
    assert combined([one]).to_bytes() == one.to_bytes()
    assert_sum(combined([one, one]), [one], [2.0])
    assert_sum(combined([one], [-0.5]), [one], [-0.5])
    assert not combined([bundle(scaling=0.0)]).spectra["x"].any()


def test_task_and_base_are_kept_where_they_agree() -> None:
    a, b = (replace(bundle(), spec=replace(bundle().spec, task_type=t)) for t in ("A", "B"))
    assert combined([a, bundle()]).spec.task_type == "A"
    assert combined([a, b]).spec.task_type is None
