"""Bundles combined without a model: entries, dtypes, what does not belong together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fourierft_export import Bundle
from fourierft_export.bundle.combine import combine_bundles
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.errors import BaseMismatchError, UsageError
from fourierft_export.spectral.delta import reference_delta
from fourierft_export.spectral.entries import entries_sha256, spectral_entries

SHAPE = (6, 8)


def bundle(
    seed: int = 1,
    n: int = 10,
    scaling: float = 2.0,
    dtype: Any = np.float32,
    layers: tuple[str, ...] = ("x", "y"),
    bound: bool = True,
    shape: tuple[int, int] = SHAPE,
    **saved: Any,
) -> Bundle:
    draw = np.random.default_rng(seed * 100 + n)
    specs = []
    for name in layers:
        digest = entries_sha256(spectral_entries(seed, shape, n))
        facts: dict[str, Any] = {"shape": shape, "entry_rule": "small", "entries_sha256": digest}
        specs.append(LayerSpec(name, n, **(facts if bound else {})))
    spectra = {name: draw.standard_normal(n).astype(dtype) for name in layers}
    return Bundle.build(AdapterSpec(seed, scaling, tuple(specs)), spectra, saved)


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
    found = combine_bundles(bundles, [0.5, 2.0, -1.0])
    assert_sum(found, bundles, [0.5, 2.0, -1.0])
    wide = np.float64 if dtype == np.float64 else np.float32
    assert found.spectra["x"].dtype == wide
    assert {m.name: m.entry_rule for m in found.layers} == {"x": "small", "y": "explicit"}
    again = [found, bundle(seed=3)]  # explicit ones combine, too
    assert_sum(combine_bundles(again, [1, 1]), again, [1, 1])
    assert_sum(combine_bundles([found, found], [1, 0.5]), [found, found], [1, 0.5])


def test_weights_are_one_by_default_and_scale_a_single_bundle() -> None:
    one = bundle()
    assert combine_bundles([one]).to_bytes() == one.to_bytes()
    assert_sum(combine_bundles([one, one]), [one], [2.0])
    assert_sum(combine_bundles([one], [-0.5]), [one], [-0.5])
    zero = combine_bundles([bundle(scaling=0.0)])
    assert not zero.spectra["x"].any()


def test_unbound_bundles_of_one_seed_stay_unbound() -> None:
    bundles = [bundle(bound=False), bundle(n=5, scaling=4.0, bound=False)]
    found = combine_bundles(bundles, [1.0, 0.5])
    assert not found.is_bound
    wanted = bundles[0].spectra["x"].copy()
    wanted[:5] += bundles[1].spectra["x"]  # 0.5 * 4.0 / 2.0
    np.testing.assert_allclose(found.spectra["x"], wanted, rtol=1e-6)
    for other in (bundle(seed=2, bound=False), bundle()):
        with pytest.raises(UsageError, match="bind"):
            combine_bundles([bundles[0], other])


def test_task_and_base_are_kept_where_they_agree() -> None:
    a, b = (replace(bundle(), spec=replace(bundle().spec, task_type=t)) for t in ("A", "B"))
    assert combine_bundles([a, bundle()]).spec.task_type == "A"
    assert combine_bundles([a, b]).spec.task_type is None


def test_bundles_of_different_bases_are_refused() -> None:
    other = bundle(layers=("base.x", "y"), shape=(8, 6))
    with pytest.raises(BaseMismatchError) as caught:
        combine_bundles([bundle(), other], names=["mine", "theirs"])
    assert caught.value.offenders == (
        "y: other shapes in mine and theirs",
        "base.x: called x by another adapter",
    )


def test_layers_whose_names_end_alike_are_not_one_layer() -> None:
    bundles = [bundle(layers=("x", "base.x")), bundle(seed=2, layers=("x",))]
    assert_sum(combine_bundles(bundles), bundles, [1.0, 1.0])


def test_heads_by_place() -> None:
    one = bundle(bias=np.ones(3, np.float32), count=np.array([1]))
    two = bundle(bias=np.full(3, 4.0, np.float32), count=np.array([2]))
    with pytest.raises(UsageError, match="say whose") as caught:
        combine_bundles([one, two])
    assert caught.value.offenders == (
        "bias: in bundle 0, bundle 1",
        "count: in bundle 0, bundle 1",
    )
    found = combine_bundles([one, two], heads=1).saved
    assert {name: list(tensor) for name, tensor in found.items()} == {
        "bias": [4.0, 4.0, 4.0],
        "count": [2],
    }
    with pytest.raises(UsageError) as caught:  # numbers that count are no average
        combine_bundles([one, two], heads="average")
    assert caught.value.offenders == ("count: in bundle 0, bundle 1",)
    for wrong in (2, -1, "bundle 0"):
        with pytest.raises(UsageError, match="heads"):
            combine_bundles([one, two], heads=wrong)


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("inf")], [1.0, 1.0, 1.0]])
def test_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="finite numbers, one for each of 2"):
        combine_bundles([bundle(), bundle()], weights)
