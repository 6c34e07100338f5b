"""The torch forms against delta_W from its definition, in float64: values, gradients, dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourierft_export.errors import UsageError
from fourierft_export.spectral import torch_ops
from fourierft_export.spectral.delta import reference_delta
from fourierft_export.spectral.entries import spectral_entries

SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 97, 130, 131])


def make_case(shape: tuple[int, int], share: float, mirrored: bool, seed: int):
    n = max(1, round(share * shape[0] * shape[1]))
    entries = spectral_entries(seed, shape, n)
    if mirrored:
        entries = np.concatenate([entries, -entries % shape])
    random = np.random.default_rng(seed)
    return random.standard_normal(len(entries)).astype(np.float32), entries, random


def token_form(x: np.ndarray, spectrum: np.ndarray, entries: np.ndarray, shape, scaling: float):
    tensors = (torch.from_numpy(array.copy()) for array in (x, spectrum, entries))
    return torch_ops.token_delta(*tensors, shape, scaling).numpy()


@given(
    shape=st.tuples(SIZES, SIZES),
    share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    mirrored=st.booleans(),
    tokens=st.sampled_from([1, 2, 33]),
    seed=st.integers(0, 2**32 - 1),
)
@example(shape=(1, 1), share=1.0, mirrored=True, tokens=2, seed=0)
@example(shape=(2, 2), share=1.0, mirrored=True, tokens=2, seed=0)
@example(shape=(6, 8), share=1.0, mirrored=False, tokens=2, seed=0)
@example(shape=(131, 1), share=1.0, mirrored=False, tokens=1, seed=0)
@settings(max_examples=75, deadline=None)
def test_token_forms_equal_the_reference(shape, share, mirrored, tokens, seed) -> None:
    spectrum, entries, random = make_case(shape, share, mirrored, seed)
    x = random.standard_normal((tokens, shape[1])).astype(np.float32)
    exact = x.astype(np.float64) @ reference_delta(spectrum, entries, shape, 3.5).T
    # Where x and delta_W nearly cancel, what remains is compared at the size of what went in.
    typical = 3.5 * np.linalg.norm(spectrum) * np.linalg.norm(x) / np.sqrt(2 * shape[0]) / shape[1]
    got = token_form(x, spectrum, entries, shape, 3.5)
    assert got.dtype == np.float32
    assert np.linalg.norm(got - exact) <= 2e-6 * max(np.linalg.norm(exact), typical)


@pytest.mark.parametrize("spectra_shape", [(4,), (4, 1), (4, 5), (1, 5)])
def test_tokens_with_spectra_of_their_own(spectra_shape: tuple[int, ...]) -> None:
    """x (4, 5, 12) with spectra of shape (..., n); `(4,)` stands for one for each batch row."""
    _, entries, random = make_case((10, 12), 0.3, True, 1)
    leading = (4, 1) if spectra_shape == (4,) else spectra_shape
    spectra = random.standard_normal((*leading, len(entries))).astype(np.float32)
    x = random.standard_normal((4, 5, 12)).astype(np.float32)
    each = np.broadcast_to(spectra, (4, 5, len(entries)))
    exact = np.empty((4, 5, 10))
    for i, j in np.ndindex(4, 5):
        exact[i, j] = reference_delta(each[i, j], entries, (10, 12), 2.0) @ x[i, j]
    np.testing.assert_allclose(token_form(x, spectra, entries, (10, 12), 2.0), exact, atol=2e-6)


def test_input_of_another_width_is_refused() -> None:
    spectrum, entries, _ = make_case((10, 12), 0.3, False, 1)
    with pytest.raises(UsageError, match="last dimension of 12") as caught:
        token_form(np.ones((2, 11), np.float32), spectrum, entries, (10, 12), 1.0)
    assert caught.value.where == "input of an adapted layer"


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 5), (5, 1), (4, 6), (5, 7), (8, 3)])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(shape: tuple[int, int], per_row: bool) -> None:
    _, entries, _ = make_case(shape, 0.2, True, 3)
    placed = torch.from_numpy(entries.copy())
    size = (3, 1, len(entries)) if per_row else (len(entries),)
    spectrum = torch.randn(size, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, shape[1], dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor, spectrum: Tensor) -> Tensor:
        return torch_ops.token_delta(x, spectrum, placed, shape, 2.5)

    def delta(c: Tensor) -> Tensor:
        return torch_ops.delta_weight(c.flatten()[: len(placed)], placed, shape, 2.5)

    assert torch.autograd.gradcheck(delta, (spectrum,))
    assert torch.autograd.gradgradcheck(delta, (spectrum,))
    assert torch.autograd.gradcheck(apply, (x, spectrum))
    assert torch.autograd.gradgradcheck(apply, (x, spectrum))
    assert torch.autograd.gradcheck(lambda c: apply(x.detach(), c), (spectrum,))
    assert torch.autograd.gradcheck(lambda x: apply(x, spectrum.detach()), (x,))
    assert torch.autograd.gradgradcheck(lambda x: apply(x, spectrum.detach()), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    spectrum, entries, random = make_case((64, 48), 0.2, False, 3)
    x = torch.from_numpy(random.standard_normal((5, 48))).to(dtype).requires_grad_()
    coefficients = torch.from_numpy(spectrum).requires_grad_()
    exact = x.detach().double().numpy() @ reference_delta(spectrum, entries, (64, 48), 5.0).T
    with torch.autocast("cpu", dtype=dtype):
        got = torch_ops.token_delta(
            x, coefficients, torch.from_numpy(entries.copy()), (64, 48), 5.0
        )
    assert got.dtype == dtype
    rounded = torch.from_numpy(exact).to(dtype).double()
    # One rounding of the output, and nothing else that shows.
    step = torch.finfo(dtype).eps
    assert ((got.detach().double() - rounded).abs() <= step * rounded.abs() + 1e-6).all()
    got.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert coefficients.grad is not None
    assert coefficients.grad.dtype == torch.float32


def held_bytes(x: Tensor, spectrum: Tensor, entries: Tensor, shape: tuple[int, int]) -> int:
    """Bytes that the graph keeps for the backward pass, apart from spectrum and entries."""
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        torch_ops.token_delta(x, spectrum, entries, shape, 1.0)
    own = {spectrum.data_ptr(), entries.data_ptr()}
    return sum(t.numel() * t.element_size() for t in held if t.data_ptr() not in own)


def test_memory_held_for_the_backward_pass() -> None:
    """x for the gradient in the spectrum, nothing for the one in x alone."""
    spectrum, entries, _ = make_case((64, 48), 0.2, False, 3)
    fixed, placed = torch.from_numpy(spectrum), torch.from_numpy(entries.copy())
    x = torch.randn(100, 48, requires_grad=True)
    assert held_bytes(x, fixed.clone().requires_grad_(), placed, (64, 48)) == 100 * 48 * 4
    assert held_bytes(x, fixed, placed, (64, 48)) == 0


def test_custom_operators_are_well_formed() -> None:
    """torch's own checks: schema, autograd registration, fake tensors, ahead-of-time dispatch."""
    _, entries, _ = make_case((20, 12), 0.2, False, 5)
    placed = torch.from_numpy(entries.copy())
    c = torch.randn(len(entries), requires_grad=True)
    x = torch.randn(3, 12, requires_grad=True)
    torch.library.opcheck(torch_ops._delta_op, (c, placed, 20, 12, 1.0))
    torch.library.opcheck(torch_ops._token_op, (x, c, placed, 20, 12, 1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision_and_gradient_dtype(dtype: torch.dtype) -> None:
    shape, scaling = (48, 36), 7.0
    entries = spectral_entries(0, shape, 200)
    spectrum = torch.randn(200, generator=torch.Generator().manual_seed(1)).to(dtype)
    spectrum.requires_grad_()
    got = torch_ops.delta_weight(spectrum, torch.from_numpy(entries.copy()), shape, scaling)
    values = spectrum.detach().double().numpy()
    exact = reference_delta(values, entries, shape, scaling)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 5e-7
    assert np.linalg.norm(got.detach().numpy() - exact) < tolerance * np.linalg.norm(exact)

    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    got.backward(upstream)
    assert spectrum.grad is not None
    assert spectrum.grad.dtype == dtype
    # d(sum(G * delta_W))/dc_k is the inner product of G with the k-th basis function.
    expected = [
        (reference_delta(np.ones(1), entries[k : k + 1], shape, scaling) * upstream.numpy()).sum()
        for k in range(200)
    ]
    rounding = {
        torch.float64: 1e-12,
        torch.float32: 2e-6,
        torch.bfloat16: 4e-3,
        torch.float16: 5e-4,
    }
    error = np.abs(spectrum.grad.double().numpy() - expected).max() / np.abs(expected).max()
    assert error < rounding[dtype]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_merging_tensors_in_place(dtype: torch.dtype, transposed: bool) -> None:
    """Within half a unit in the last place, plus 1e-6 of the largest delta, of the exact sum."""
    shape, scaling = (30, 44), 0.5
    entries = spectral_entries(5, shape, 100)
    spectra = [torch.randn(100) for _ in range(3)]
    weights = [0.02 * torch.randn(shape[::-1] if transposed else shape) for _ in range(3)]
    weights = [weight.to(dtype) for weight in weights]
    before = [weight.clone() for weight in weights]
    torch_ops.merge_delta_weights(
        weights,
        spectra,
        torch.from_numpy(entries.copy()),
        scaling,
        transposed=transposed,
        in_place=True,
    )
    for weight, was, spectrum in zip(weights, before, spectra, strict=True):
        delta = torch.from_numpy(reference_delta(spectrum.numpy(), entries, shape, scaling))
        exact = was.double() + (delta.T if transposed else delta)
        exponent = torch.floor(torch.log2(exact.abs().clamp(min=torch.finfo(dtype).tiny)))
        spacing = torch.finfo(dtype).eps * torch.exp2(exponent)
        assert ((weight.double() - exact).abs() <= spacing / 2 + 1e-6 * delta.abs().max()).all()
        assert not torch.equal(weight, was)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_weight_is_the_sum_with_the_same_gradient(dtype: torch.dtype) -> None:
    shape = (30, 44)
    placed = torch.from_numpy(spectral_entries(5, shape, 100).copy())
    weight = torch.randn(shape).to(dtype)
    spectrum = torch.randn(100, requires_grad=True)
    merged = torch_ops.delta_weight(spectrum, placed, shape, 3.0, weight)
    delta = torch_ops.delta_weight(spectrum, placed, shape, 3.0)
    torch.testing.assert_close(merged, weight.to(merged.dtype) + delta.to(merged.dtype))
    assert merged.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.randn(shape)
    of_merged = torch.autograd.grad(merged, spectrum, upstream.to(merged.dtype))
    of_delta = torch.autograd.grad(delta, spectrum, upstream)
    torch.testing.assert_close(of_merged, of_delta)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (96, 130)])
def test_another_device_equals_the_cpu(shape: tuple[int, int]) -> None:
    """delta_W, token form and their gradients; nothing is copied back by hand."""
    entries = torch.from_numpy(spectral_entries(5, shape, 40).copy())
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        spectrum = torch.randn(40).to(device).requires_grad_()
        x = torch.randn(3, shape[1]).to(device).requires_grad_()
        there = entries.to(device)
        delta = torch_ops.delta_weight(spectrum, there, shape, 2.0)
        token = torch_ops.token_delta(x, spectrum, there, shape, 2.0)
        grads = torch.autograd.grad(delta.square().sum() + token.sin().sum(), (spectrum, x))
        results.append([tensor.detach().cpu() for tensor in (delta, token, *grads)])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
