"""Singular values from the sparse form, against numpy's SVD of delta_W in float64."""

from __future__ import annotations

import numpy as np
import pytest

from fourierft_export.spectral import singular
from fourierft_export.spectral.delta import reference_delta
from fourierft_export.spectral.entries import spectral_entries


@pytest.mark.parametrize("large", [3, 512])
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3), (1, 7), (8, 8), (9, 7), (12, 5), (7, 12), (30, 41)]
)
def test_values_and_factors(
    shape: tuple[int, int], large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes odd and even; from one coefficient to as many as the matrix has elements."""
    monkeypatch.setattr(singular, "LARGE", large)
    size = shape[0] * shape[1]
    for n in {1, min(3, size), min(12, size), size}:
        entries = spectral_entries(5, shape, n)
        spectrum = np.random.default_rng(n).standard_normal(n)
        delta = reference_delta(spectrum, entries, shape, 3.0)
        found = singular.singular_values(spectrum, entries, shape, 3.0)
        wanted = np.linalg.svd(delta, compute_uv=False)
        known = len(found.values)
        np.testing.assert_allclose(found.values, wanted[:known], atol=1e-6 * wanted[0])
        assert (wanted[known:] <= 2e-7 * wanted[0]).all()
        assert found.energies[-1] == pytest.approx((delta**2).sum())
        for rank in (1, min(shape), min(shape) + 2):
            left, right = found.factors(rank)
            assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
            lost = np.sqrt((wanted[rank:] ** 2).sum())
            error = np.linalg.norm(delta - left @ right)
            assert error == pytest.approx(lost, abs=1e-6 * wanted[0])


def test_mirrored_entries_and_zeros() -> None:
    entries = np.array([[1, 2], [7, 6], [0, 0], [4, 4], [3, 0]])  # (7, 6) is (1, 2) again
    spectrum = np.array([1.0, -1.0, 2.0, 0.0, 0.5], np.float32)
    found = singular.singular_values(spectrum, entries, (8, 8), 10.0)
    delta = reference_delta(spectrum, entries, (8, 8), 10.0)
    np.testing.assert_allclose(np.matmul(*found.factors(8)), delta, atol=1e-12)
    assert len(found.values) == np.linalg.matrix_rank(delta)
    nothing = singular.singular_values(spectrum * 0, entries, (8, 8), 10.0)
    assert (len(nothing.values), nothing.energies.tolist()) == (0, [0.0])
    assert not np.matmul(*nothing.factors(2)).any()
