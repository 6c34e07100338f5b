"""The numbers of a merge against float64, for every dtype and size of change."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fourierft_export.errors import BadInputError
from fourierft_export.merge.rounding import add_deltas, break_ties, convert
from fourierft_export.spectral.delta import Term, reference_delta
from fourierft_export.spectral.entries import spectral_entries

Array = np.ndarray[Any, Any]

# safetensors name -> (numpy dtype, bits of the significand, smallest exponent)
FLOATS = {
    "F64": (np.float64, 53, -1022),
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
@pytest.mark.parametrize(
    ("source", "dtype"), [("F32", "F16"), ("F32", "BF16"), *((name, name) for name in FLOATS)]
)
def test_within_half_a_unit_of_the_exact_sum(
    source: str, dtype: str, rms: float, count: int, transposed: bool
) -> None:
    terms, delta = terms_of((384, 512), rms, count)
    delta = delta.T if transposed else delta
    random = np.random.default_rng(0).standard_normal(delta.shape) * 0.02
    weight = random.astype(FLOATS[source][0])
    exact = weight.astype(np.float64) + delta
    found = add_deltas(weight, terms, transposed=transposed, dtype=dtype, name="w")
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
        found = add_deltas(weight, terms, transposed=False, dtype="BF16", name="w").survival
        assert found == pytest.approx(expected, abs=0.02)


def rounded(weight: float, delta: float, dtype: Any) -> float:
    """A sum rounded once, each of four elements alike."""
    w, d = np.full((1, 4), weight, np.float32), np.full((1, 4), delta, np.float32)
    total = w + d
    break_ties(total, w, d, np.dtype(dtype), np.empty(w.shape, bool))
    result = total.astype(dtype).astype(float)
    assert len({*result.ravel()}) == 1
    return float(result[0, 0])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_sums_halfway_between_two_values_are_decided_by_the_exact_sum(dtype: str) -> None:
    """A weight of 1 plus half a unit, give or take less than float32 can hold, and ties."""
    kind, bits, _ = FLOATS[dtype]
    half = 2.0**-bits
    unit = 2 * half
    for odd, tiny, expected in (
        (0, 0.0, 1.0), (0, 1e-9, 1 + unit), (0, -1e-9, 1.0),
        (1, 0.0, 1 + 2 * unit), (1, 1e-9, 1 + 2 * unit), (1, -1e-9, 1 + unit),
    ):  # fmt: skip
        assert rounded(1 + odd * unit, half + tiny, kind) == expected, (odd, tiny)
    least = 2.0**-24  # float16's smallest value
    for tiny, expected in ((-1e-14, 4 * least), (0.0, 4 * least), (1e-14, 5 * least)):
        assert dtype == "BF16" or rounded(4 * least, least / 2 + tiny, kind) == expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_error_of_what_was_added_is_measured(dtype: str, transposed: bool) -> None:
    terms, delta = terms_of((96, 128), 1e-4, 2)
    delta = delta.T if transposed else delta
    weight = (np.random.default_rng(0).standard_normal(delta.shape) * 0.02).astype(FLOATS[dtype][0])
    found = add_deltas(weight.copy(), terms, transposed=transposed, dtype=dtype, name="w")
    added = found.value.astype(np.float64) - weight.astype(np.float64)
    expected = np.linalg.norm(added - delta) / np.linalg.norm(delta)
    assert found.error == pytest.approx(expected, rel=1e-3 if dtype != "F32" else 0.05)


def test_in_place_and_any_number_of_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    terms, _ = terms_of((512, 640), 1e-4, 2)
    weight = (np.random.default_rng(0).standard_normal((512, 640)) * 0.02).astype(np.float16)
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        for overwrite in (False, True):
            given = weight.copy()
            options: dict[str, Any] = {"transposed": False, "dtype": "F16", "name": "w"}
            found = add_deltas(given, terms, overwrite=overwrite, **options)
            assert (found.value is given) == overwrite
            assert (given == weight).all() != overwrite
            results.append((found.value.tobytes(), found.survival, found.error))
    assert len(set(results)) == 1


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
        convert(value, dtype, "some.weight")
    assert "some.weight" in caught.value.where
