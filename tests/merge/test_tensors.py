"""The numbers of a merge against float64, for every dtype and size of change."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fourierft_export.errors import BadInputError
from fourierft_export.merge.rounding import delta_at, rounded_once
from fourierft_export.merge.tensors import converted, merged
from fourierft_export.spectral.delta import Term, reference_delta
from fourierft_export.spectral.entries import spectral_entries

Array = np.ndarray[Any, Any]

# safetensors name -> (numpy dtype, bits of the significand, smallest exponent)
FLOATS = {
    "F32": (np.float32, 24, -126),
    "F16": (np.float16, 11, -14),
    "BF16": (ml_dtypes.bfloat16, 8, -126),
}


def half_ulp(exact: Array, dtype: str) -> Array:
    """Half the distance of the neighbours of `exact` in a dtype."""
    _, bits, smallest = FLOATS[dtype]
    _, exponent = np.frexp(exact)
    return np.ldexp(0.5, np.maximum(exponent - 1, smallest) + 1 - bits)


def terms_of(shape: tuple[int, int], rms: float, count: int) -> tuple[list[Term], Array]:
    """Terms whose deltas have about this root mean square, and their exact sum."""
    random = np.random.default_rng(count)
    terms = []
    for number in range(count):
        entries = spectral_entries(777 + number, shape, 300)
        spectrum = random.standard_normal(300).astype(np.float32)
        size = np.sqrt(np.square(reference_delta(spectrum, entries, shape, 1.0)).mean())
        terms.append(Term(spectrum, entries, rms / size))
    return terms, sum(reference_delta(t.spectrum, t.entries, shape, t.scaling) for t in terms)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rms", [6.6e-4, 6.6e-6, 6.6e-8])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("source", ["F32", "out"])
def test_within_half_a_unit_of_the_exact_sum(
    dtype: str, source: str, rms: float, count: int, transposed: bool
) -> None:
    terms, delta = terms_of((384, 512), rms, count)
    delta = delta.T if transposed else delta
    random = np.random.default_rng(0).standard_normal(delta.shape) * 0.02
    weight = random.astype(np.float32 if source == "F32" else FLOATS[dtype][0])
    exact = weight.astype(np.float64) + delta
    found = merged(weight, terms, transposed=transposed, dtype=dtype, name="w")
    assert found.value.dtype == FLOATS[dtype][0]
    excess = np.abs(found.value.astype(np.float64) - exact) - half_ulp(exact, dtype)
    assert (excess <= 1e-6 * np.abs(delta).max()).all()
    before = weight.astype(FLOATS[dtype][0])
    assert found.survival == (found.value != before).mean()


def test_survival_in_bfloat16_is_what_mathematics_says() -> None:
    """1024 x 1024, W std 0.02: the share of weights that change, for three sizes of delta_W."""
    weight = (np.random.default_rng(0).standard_normal((1024, 1024)) * 0.02).astype(
        ml_dtypes.bfloat16
    )
    for rms, expected in ((6.6e-4, 0.95), (6.6e-5, 0.55), (6.6e-6, 0.08)):
        terms, _ = terms_of((1024, 1024), rms, 1)
        found = merged(weight, terms, transposed=False, dtype="BF16", name="w").survival
        assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_sums_halfway_between_two_values_are_decided_by_the_exact_sum(dtype: str) -> None:
    """A weight of 1 plus half a unit, give or take less than float32 can hold, and ties."""
    kind, bits, _ = FLOATS[dtype]
    half = 2.0**-bits
    unit = 2 * half
    shape = (1, 4)
    # Entry (0, 0) is the mean: delta_W is c * s / 4 everywhere.
    entries = np.array([[0, 0]])
    for odd, tiny, expected in (
        (0, 0.0, 1.0), (0, 1e-9, 1 + unit), (0, -1e-9, 1.0),
        (1, 0.0, 1 + 2 * unit), (1, 1e-9, 1 + 2 * unit), (1, -1e-9, 1 + unit),
    ):  # fmt: skip
        weight = np.full(shape, 1 + odd * unit, kind)
        term = Term(np.array([1.0]), entries, 4 * (half + tiny))
        total = (weight.astype(np.float64) + half + tiny).astype(np.float32)
        assert (total == np.float32(1 + odd * unit + half)).all()
        found = rounded_once(total, weight, [term], transposed=False, dtype=np.dtype(kind))
        assert (found.astype(np.float64) == expected).all(), (odd, tiny)


def test_float16_subnormals_are_decided_by_the_exact_sum() -> None:
    unit = 2.0**-24
    weight = np.full((1, 4), 4 * unit, np.float16)
    for tiny, expected in ((-1e-16, 4 * unit), (0.0, 4 * unit), (1e-16, 5 * unit)):
        term = Term(np.array([1.0]), np.array([[0, 0]]), 4 * (unit / 2 + tiny))
        total = np.full((1, 4), 4.5 * unit, np.float32)
        found = rounded_once(total, weight, [term], transposed=False, dtype=np.dtype(np.float16))
        assert (found.astype(np.float64) == expected).all()


def test_single_elements_equal_the_reference() -> None:
    terms, delta = terms_of((17, 40), 1.0, 1)
    p, q = np.nonzero(np.ones((17, 40)))
    found = delta_at(terms[0], p, q, (17, 40)).reshape(17, 40)
    np.testing.assert_allclose(found, delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (np.array([1.0, 65520.0], np.float32), "F16", "1 that overflow"),
        (np.array([3.4e38] * 2, np.float32), "BF16", "2 that overflow"),
        (np.array([1e300]), "F32", "1 that overflow"),
    ],
)
def test_conversions_that_overflow_are_refused(value: Array, dtype: str, says: str) -> None:
    with pytest.raises(BadInputError, match=says) as caught:
        converted(value, dtype, "some.weight")
    assert "some.weight" in caught.value.where


def test_conversions_keep_infinities_and_other_dtypes() -> None:
    found = converted(np.array([np.inf, np.nan, 65519.0], np.float32), "F16", "w")
    np.testing.assert_array_equal(found, np.array([np.inf, np.nan, 65504.0], np.float16))
    whole = np.array([1, 2])
    assert converted(whole, "F16", "w") is whole
