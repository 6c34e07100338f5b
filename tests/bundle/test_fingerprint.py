"""Verdicts on base weights: same, same in another precision, different."""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fourierft_export.bundle.fingerprint import FINGERPRINT_BYTES, compare_weight, fingerprint
from fourierft_export.bundle.spec import Fingerprint

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}


@pytest.fixture
def weight() -> np.ndarray[Any, Any]:
    """A weight as models have them: normal, standard deviation 0.02."""
    return (np.random.default_rng(0).standard_normal((24, 40)) * 0.02).astype(np.float32)


def test_it_is_what_the_format_says(weight: np.ndarray[Any, Any]) -> None:
    found = fingerprint(weight)
    assert found.dtype == "F32"
    assert found.digest == hashlib.sha256(weight.tobytes()).digest()[:16]
    flat = weight.ravel()
    picked = [flat[(2 * i + 1) * 960 // 16] for i in range(8)]
    assert found.samples == np.array(picked).astype(ml_dtypes.bfloat16).tobytes()
    assert len(found.digest) + len(found.samples) == FINGERPRINT_BYTES == 32


@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("deployed", DTYPES)
def test_a_cast_weight_is_the_same_in_another_precision(
    trained: str, deployed: str, weight: np.ndarray[Any, Any]
) -> None:
    """Cast from the same original, or from the rounded weight that was trained on."""
    expected = "same" if trained == deployed else "precision"
    rounded, stored = weight.astype(DTYPES[trained]), weight.astype(DTYPES[deployed])
    known = fingerprint(rounded)
    assert (
        compare_weight(known, stored)
        == compare_weight(known, np.asfortranarray(stored))
        == expected
    )
    assert compare_weight(known, rounded.astype(DTYPES[deployed])) == expected


@pytest.mark.parametrize("name", DTYPES)
def test_another_weight_is_different(name: str, weight: np.ndarray[Any, Any]) -> None:
    other = (np.random.default_rng(1).standard_normal((24, 40)) * 0.02).astype(DTYPES[name])
    assert compare_weight(fingerprint(weight), other) == "different"
    assert compare_weight(fingerprint(weight), weight.T.astype(DTYPES[name])) == "different"
    assert compare_weight(fingerprint(weight), (weight * 1.05).astype(DTYPES[name])) == "different"
    changed = weight.copy()
    changed.view(np.uint32)[3, 3] ^= 1  # one bit
    assert compare_weight(fingerprint(weight), changed) == "different"


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (8, 1), (3, 5)])
def test_small_weights(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    assert compare_weight(fingerprint(weight), weight) == "same"
    assert compare_weight(fingerprint(weight), weight.astype(np.float16)) == "precision"
    assert compare_weight(fingerprint(weight), weight + 1) == "different"


def test_values_that_float16_cannot_hold_raise_no_warning() -> None:
    huge = np.full((4, 4), 3e38, np.float32)
    assert compare_weight(fingerprint(huge), np.full((4, 4), np.inf, np.float16)) == "different"
    tiny = np.full((4, 4), 1e-9, np.float32)
    assert compare_weight(fingerprint(tiny), tiny.astype(np.float16)) == "precision"


def test_samples_of_nan_match_nothing(weight: np.ndarray[Any, Any]) -> None:
    nan = np.full(8, np.nan, ml_dtypes.bfloat16).tobytes()
    hostile = Fingerprint("F16", b"\0" * 16, nan)
    assert compare_weight(hostile, weight) == "different"
