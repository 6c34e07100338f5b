"""Every form of delta_W against its definition as a sum of cosines, in float64."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fourierft_export.errors import UsageError
from fourierft_export.spectral import cost, torch_kernels
from fourierft_export.spectral.delta import Term, add_delta_weight, adder, rebuild, reference_delta
from fourierft_export.spectral.entries import spectral_entries

SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 97, 130, 131])
# Every way there is to delta_W: numpy's two, and what torch does off the CPU.
FORMS = [*cost.DELTA_PATHS, "torch"]


def cosine_sum(spectrum: np.ndarray, entries: np.ndarray, shape: tuple, scaling: float):
    """delta_W by its formula, one cosine at a time; phases are exact integers."""
    rows, columns = shape
    p, q = np.ogrid[:rows, :columns]
    total = np.zeros(shape)
    for c, (u, v) in zip(spectrum.astype(np.float64), entries.tolist(), strict=True):
        phase = (u * p * columns + v * q * rows) % (rows * columns)
        total += c * np.cos(2 * np.pi * phase / (rows * columns))
    return total * scaling / (rows * columns)


def fast_delta(form: str, spectrum: np.ndarray, entries: np.ndarray, shape: tuple, scaling: float):
    if form in cost.DELTA_PATHS:
        with cost.force(delta=form):
            return delta_weight(spectrum, entries, shape, scaling)
    tensors = torch.from_numpy(spectrum.copy()), torch.from_numpy(entries.copy())
    return torch_kernels.delta_by_fft(*tensors, shape, scaling).numpy()


def delta_weights(spectra, entries, shape, scaling: float, threads: int | None = None):
    deltas = [np.empty(shape, np.float32) for _ in spectra]
    rebuild(shape, spectra, entries, scaling, adder(None, deltas), threads)
    return deltas


def delta_weight(spectrum, entries, shape, scaling: float, threads: int | None = None):
    return delta_weights(spectrum[None], entries, shape, scaling, threads)[0]


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / max(np.linalg.norm(exact), 1e-30))


def make_case(shape: tuple, share: float, mirrored: bool, seed: int):
    """A spectrum over a share of all entries; with `mirrored`, half are the others' mirror."""
    n = max(1, round(share * shape[0] * shape[1]))
    entries = spectral_entries(seed, shape, n)
    if mirrored:
        entries = np.concatenate([entries, -entries % shape])[: max(2, n)]
    spectrum = np.random.default_rng(seed).standard_normal(len(entries)).astype(np.float32)
    return spectrum, entries


@given(
    shape=st.tuples(SIZES, SIZES),
    share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    mirrored=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(shape=(1, 1), share=1.0, mirrored=True, seed=0)
@example(shape=(2, 2), share=1.0, mirrored=True, seed=0)
@example(shape=(1, 131), share=1.0, mirrored=False, seed=1)
@example(shape=(131, 1), share=1.0, mirrored=False, seed=1)
@example(shape=(130, 130), share=1.0, mirrored=False, seed=2)
@settings(max_examples=75, deadline=None)
def test_fast_forms_equal_the_reference(
    shape: tuple, share: float, mirrored: bool, seed: int
) -> None:
    spectrum, entries = make_case(shape, share, mirrored, seed)
    exact = reference_delta(spectrum, entries, shape, 3.5)
    # Mirrored pairs can cancel; then what remains is compared at the size of what went in.
    size = 3.5 * np.linalg.norm(spectrum) / np.sqrt(2 * shape[0] * shape[1])
    for form in FORMS:
        got = fast_delta(form, spectrum, entries, shape, 3.5)
        assert got.dtype == np.float32
        assert np.linalg.norm(got - exact) <= 2e-6 * max(np.linalg.norm(exact), size), form


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 8), (8, 3), (7, 5), (6, 4)])
def test_reference_equals_the_cosine_sum(shape: tuple) -> None:
    spectrum, entries = make_case(shape, 1.0, True, 4)
    exact = cosine_sum(spectrum, entries, shape, 2.0)
    assert relative_error(reference_delta(spectrum, entries, shape, 2.0), exact) < 1e-13


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("u", [0, 1, 3, 5])
@pytest.mark.parametrize("v", [0, 1, 4, 7])
def test_single_entries_with_nyquist_rows_and_columns(form: str, u: int, v: int) -> None:
    """Shape (6, 8): u = 3 and v = 4 are their own mirror images."""
    entries, spectrum = np.array([[u, v]]), np.array([1.5], np.float32)
    exact = cosine_sum(spectrum, entries, (6, 8), 10.0)
    assert relative_error(fast_delta(form, spectrum, entries, (6, 8), 10.0), exact) < 5e-7


@pytest.mark.parametrize("form", FORMS)
def test_layer_of_real_size(form: str) -> None:
    spectrum, entries = make_case((768, 3072), 1000 / (768 * 3072), False, 2024)
    exact = reference_delta(spectrum, entries, (768, 3072), 300.0)
    assert relative_error(fast_delta(form, spectrum, entries, (768, 3072), 300.0), exact) < 5e-7


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(33, 50), (64, 130), (1, 7)])
def test_adding_rounds_once(dtype: type, transposed: bool, shape: tuple) -> None:
    """Within half a unit in the last place, plus 1e-6 of the largest delta, of the exact sum."""
    random = np.random.default_rng(1)
    weight = (0.02 * random.standard_normal(shape)).astype(dtype)
    terms = [Term(*make_case(shape, 0.5, True, seed), 0.3) for seed in (1, 2)]
    deltas = [reference_delta(*term[:2], shape, term.scaling) for term in terms]
    exact = weight.astype(np.float64) + sum(deltas)
    stored = weight.T.copy() if transposed else weight
    before = stored.copy()
    got = add_delta_weight(stored, terms, transposed=transposed)
    assert got.dtype == weight.dtype
    assert np.array_equal(stored.view(np.uint8), before.view(np.uint8))
    upright = got.T if transposed else got
    spacing = np.abs(np.spacing(np.abs(exact).astype(dtype)).astype(np.float64))
    slack = 1e-6 * max(np.abs(delta).max() for delta in deltas)
    assert np.all(np.abs(upright.astype(np.float64) - exact) <= spacing / 2 + slack)


def test_adding_nothing_returns_the_weight_and_out_dtype_is_followed() -> None:
    weight = np.linspace(-1, 1, 12).astype(ml_dtypes.bfloat16).reshape(3, 4)
    assert np.array_equal(add_delta_weight(weight, []), weight)
    assert add_delta_weight(weight, [], out_dtype=np.float32).dtype == np.float32


def float32_weights(shape: tuple, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [(0.02 * random.standard_normal(shape)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("path", cost.DELTA_PATHS)
@pytest.mark.parametrize("count", [1, 5])
def test_layers_together_equal_layers_alone(threads: int, path: str, count: int) -> None:
    """Large enough for several blocks and threads; bit for bit, whatever the threads."""
    shape, n = (520, 1000), 60
    entries = spectral_entries(8, shape, n)
    spectra = np.random.default_rng(0).standard_normal((count, n)).astype(np.float32)
    weights = float32_weights(shape, count)
    with cost.force(delta=path):
        alone = [delta_weight(c, entries, shape, 2.0, threads=1) for c in spectra]
        together = delta_weights(spectra, entries, shape, 2.0, threads=threads)
        merged = [weight.copy() for weight in weights]
        rebuild(shape, spectra, entries, 2.0, adder(merged, merged), threads)
    for i in range(count):
        assert np.array_equal(together[i], alone[i])
        assert np.array_equal(merged[i], weights[i] + alone[i])


def test_in_place_merge_needs_little_memory() -> None:
    """At most 0.3 of the float32 weight, as numpy's allocations are traced."""
    shape, n = (4096, 4096), 1000
    entries = spectral_entries(8, shape, n)
    spectrum = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    weight = np.zeros(shape, np.float32)
    tracemalloc.start()
    try:
        rebuild(shape, spectrum[None], entries, 1.0, adder([weight], [weight]), 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.3 * weight.nbytes
    assert np.abs(weight).max() > 0


def added(spectrum, entries, shape, scaling: float) -> np.ndarray:
    return add_delta_weight(np.zeros(shape, np.float32), [Term(spectrum, entries, scaling)])


@pytest.mark.parametrize("function", [added, reference_delta])
@pytest.mark.parametrize(
    ("n", "entries", "shape", "where"),
    [
        (2, [[0, 0]], (4, 4), "spectrum"),
        (1, [[4, 0]], (4, 4), "spectral entries"),
        (1, [[0, -1]], (4, 4), "spectral entries"),
        (1, [[0, 0]], (4, 4, 4), "delta_W"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(function, n, entries, shape, where) -> None:
    with pytest.raises(UsageError) as caught:
        function(np.ones(n, np.float32), np.array(entries), shape, 1.0)
    assert caught.value.where == where
