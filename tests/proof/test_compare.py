"""The arithmetic of a comparison, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fourierft_export.proof import compare
from fourierft_export.proof.compare import Conditions, compare_change, rms_difference
from fourierft_export.proof.report import OutputComparison
from fourierft_export.proof.tolerances import Tolerance


def compare_outputs(left: Any, right: Any, **options: Any) -> tuple[OutputComparison, ...]:
    rest = {name: options.pop(name) for name in ("tolerance", "effect") if name in options}
    return compare.compare_outputs(left, right, Conditions(**options), **rest)


def one(left: object, right: object, **options: Any) -> OutputComparison:
    (result,) = compare_outputs({"logits": np.array(left)}, {"logits": np.array(right)}, **options)
    return result


def test_every_number_is_what_its_definition_says() -> None:
    left = [[1.0, 2.0, 4.0], [8.0, 0.0, -1.0]]
    right = [[1.0, 2.5, 4.0], [6.0, 0.0, -1.0]]
    found = one(left, right).difference
    assert found is not None
    assert found.count == 6
    assert found.scale == 8.0
    assert found.max_abs == 2.0
    assert found.max_rel == 0.25  # 2 of 8, and 0.5 of 2
    assert found.mean_abs == pytest.approx(2.5 / 6, rel=1e-15)
    assert found.rms == pytest.approx(np.sqrt(4.25 / 6), rel=1e-15)
    dot = 1 + 5 + 16 + 48 + 0 + 1
    lengths = np.sqrt(1 + 4 + 16 + 64 + 1) * np.sqrt(1 + 6.25 + 16 + 36 + 1)
    assert found.cosine == pytest.approx(dot / lengths, rel=1e-15)
    assert found.argmax == 1.0
    assert found.index == (1, 0)
    assert (found.left, found.right) == (8.0, 6.0)


def test_statistics_are_what_their_definitions_say() -> None:
    from scipy.special import log_softmax
    from scipy.stats import binomtest

    draw = np.random.default_rng(0)
    left = draw.normal(size=(3, 4, 7))
    right = left + 0.5 * draw.normal(size=left.shape)
    tokens = draw.integers(0, 7, size=(3, 4))
    tokens[1, 2:] = -1
    found = one(left, right, tokens=tokens).difference
    assert found is not None and found.argmax is not None
    same = round(found.argmax * 12)
    assert same == (left.argmax(-1) == right.argmax(-1)).sum()
    expected = binomtest(same, 12).proportion_ci(0.95, "wilson")
    assert found.agreement == pytest.approx((expected.low, expected.high), rel=1e-6)
    a, b = log_softmax(left, -1), log_softmax(right, -1)
    assert found.kl == pytest.approx((np.exp(a) * (a - b)).sum(-1).mean())
    places = [(i, t) for i in range(3) for t in range(3) if tokens[i, t + 1] >= 0]
    losses = [-np.mean([side[i, t, tokens[i, t + 1]] for i, t in places]) for side in (a, b)]
    assert found.perplexity == pytest.approx(np.exp(losses))
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    assert found.row_cosine == pytest.approx(((left * right).sum(-1) / norms).mean())


def test_max_rel_leaves_out_values_next_to_zero() -> None:
    found = one([1000.0, 0.1], [1000.0, 0.2]).difference
    assert found is not None and found.max_rel == 0.0
    found = one([1000.0, 10.0], [1000.0, 11.0]).difference
    assert found is not None and found.max_rel == pytest.approx(0.1)


def test_the_bound_is_a_fraction_of_the_scale() -> None:
    assert one([100.0, 1.0], [100.0, 1.009]).ok  # below 1e-4 of 100
    result = one([100.0, 1.0], [100.0, 1.011])
    assert not result.ok
    assert result.allowed_abs == pytest.approx(0.01)
    assert "logits[1] is 1 against 1.011" in result.reason
    assert one([100.0, 1.0], [100.0, 1.011], tolerance=Tolerance(2e-4)).ok


def test_a_small_difference_fails_beside_a_small_effect() -> None:
    left, right = [100.0, 1.0], [100.0, 1.001]
    rms = 0.001 / np.sqrt(2)
    assert one(left, right).ok
    assert one(left, right, effect={"logits": rms / 0.001}, noise={"logits": 0.0}).ok
    result = one(left, right, effect={"logits": rms / 0.003}, noise={"logits": 0.0})
    assert not result.ok
    assert "0.30% of what the adapter changes" in result.reason
    assert result.resolution == pytest.approx(0.002)
    # The same difference may be noise.
    assert one(left, right, effect={"logits": rms / 0.003}, noise={"logits": rms / 8}).ok


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail_even_on_both_sides(bad: float) -> None:
    for left, right in (([1.0, bad], [1.0, 2.0]), ([1.0, 2.0], [1.0, bad]), ([1.0, bad],) * 2):
        result = one(left, right)
        assert not result.ok
        assert f"logits[1] of the {'left' if bad in left or left[1] != left[1] else 'right'}" in (
            result.reason
        )
    (change,) = compare_change({"y": np.array([1.0, bad])}, {"y": np.array([2.0, 2.0])})
    assert not change.ok


def test_padding_is_ignored_for_token_outputs_and_only_there() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    tokens = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    other = tokens.copy()
    other[0, 2] = 1e6
    other[1, 1:] = np.nan
    (result,) = compare_outputs({"h": tokens}, {"h": other}, mask=mask)
    assert result.ok
    assert result.difference is not None and result.difference.count == 6
    other[1, 0, 1] = -5
    (result,) = compare_outputs({"h": tokens}, {"h": other}, mask=mask)
    assert not result.ok
    assert result.difference is not None and result.difference.index == (1, 0, 1)
    # (rows, labels) may look like (rows, positions), but is no token output.
    (result,) = compare_outputs({"h": mask * 1.0}, {"h": mask * 1.0 + 1}, mask=mask)
    assert result.difference is not None and result.difference.count == 6
    (result,) = compare_outputs({"h": tokens}, {"h": tokens}, mask=mask * 0)
    assert not result.ok


def test_argmax_must_be_the_same_but_ties_may_turn() -> None:
    logits = np.array([[1.0, 1.0 + 1e-9, 0.0], [5.0, 1.0, 2.0]])
    turned = logits.copy()
    turned[0, :2] = turned[0, 1::-1]
    assert one(logits, turned).ok
    assert not one(logits, turned, noise={"logits": 1e-12}).ok
    assert one(logits, turned, noise={"logits": 1e-12}, tolerance=Tolerance(1, argmax=0.5)).ok
    (result,) = compare_outputs({"h": logits}, {"h": turned}, noise={"h": 1e-12})
    assert result.ok  # the argmax of a hidden state decides nothing
    assert result.difference is not None and result.difference.argmax == 0.5


def test_missing_outputs_and_other_shapes_fail_by_name() -> None:
    (result,) = compare_outputs({"logits": np.ones(2)}, {"scores": np.ones(2)})
    assert not result.ok and "no output logits (it has: scores)" in result.reason
    result = one(np.ones((2, 3)), np.ones((2, 2)))
    assert not result.ok and "shape (2, 3) against (2, 2)" in result.reason
    assert not one(np.ones((0, 3)), np.ones((0, 3))).ok
    (nothing,) = compare_outputs({}, {})
    assert not nothing.ok


def test_a_change_has_to_be_above_the_noise() -> None:
    base = {"y": np.array([1.0, 2.0])}
    (same,) = compare_change(base, base)
    assert not same.ok and "changes nothing in y" in same.reason
    (tiny,) = compare_change(base, {"y": base["y"] + 1e-9})
    assert not tiny.ok
    (real,) = compare_change(base, {"y": base["y"] + 1e-3})
    assert real.ok
    (noisy,) = compare_change(base, {"y": base["y"] + 1e-3}, Conditions(noise={"y": 1e-3}))
    assert not noisy.ok
    (shape,) = compare_change(base, {"y": np.ones(3)})
    assert shape.ok  # more labels than the base has: a change


def test_scalars_and_half_precision_are_compared_in_double() -> None:
    (result,) = compare_outputs({"loss": np.float32(2)}, {"loss": np.float32(3)})
    assert result.difference is not None and result.difference.max_abs == 1.0
    for dtype in (np.float16, ml_dtypes.bfloat16):
        big = np.full((2, 4), 200.0, dtype)
        (result,) = compare_outputs({"y": big}, {"y": -big})
        # 200 squared overflows float16; in double it does not.
        assert result.difference is not None and result.difference.rms == 400.0


finite = st.floats(-1e6, 1e6, width=32)


@given(arrays.arrays(np.float32, st.tuples(*[st.integers(1, 4)] * 3), elements=finite))
def test_an_array_agrees_with_itself_and_not_with_a_moved_one(array: np.ndarray) -> None:
    (same,) = compare_outputs({"logits": array}, {"logits": array}, effect={"logits": 0.0})
    assert same.ok and same.difference is not None
    assert same.difference.max_abs == same.difference.rms == 0.0
    assert same.difference.cosine == pytest.approx(1.0)
    moved = array.astype(np.float64)
    moved.flat[moved.size // 2] += 2e-4 * np.abs(moved).max() + 1.0
    (other,) = compare_outputs({"logits": array}, {"logits": moved})
    assert not other.ok


def test_rms_difference_leaves_out_what_has_no_bound() -> None:
    left = {"a": np.array([3.0, 4.0]), "b": np.ones(2), "c": np.array([np.nan, 1.0])}
    right = {"a": np.zeros(2), "b": np.ones(3), "c": np.ones(2)}
    assert rms_difference(left, right) == {"a": np.sqrt(12.5)}
