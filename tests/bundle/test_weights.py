"""Factors of bundles: one finite number for each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fourierft_export.bundle.combine import checked_weights
from fourierft_export.errors import UsageError


def test_weights_are_one_each_by_default() -> None:
    assert checked_weights(None, 3) == (1.0, 1.0, 1.0)
    assert checked_weights([2, -0.5], 2) == (2.0, -0.5)


@pytest.mark.parametrize("weights", [[], [1], [1, 2, 3], [1, float("nan")], [float("inf"), 1]])
def test_weights_that_make_no_sense(weights: Sequence[float]) -> None:
    with pytest.raises(UsageError, match="one for each of 2"):
        checked_weights(weights, 2)
