"""What the torch forms add: gradients, dtypes."""

import numpy as np
import pytest
import torch

from fourierft_export.spectral import torch_ops
from fourierft_export.spectral.delta import reference_delta
from fourierft_export.spectral.entries import spectral_entries

SHAPES = [(1, 1), (2, 2), (1, 5), (5, 1), (6, 8), (7, 9), (16, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_in_the_spectrum(shape: tuple[int, int]) -> None:
    entries = torch.from_numpy(spectral_entries(3, shape, min(12, shape[0] * shape[1])).copy())
    entries = torch.cat([entries, -entries % torch.tensor(shape)])  # mirrored pairs too
    spectrum = torch.randn(len(entries), dtype=torch.float64, requires_grad=True)

    def delta(c: torch.Tensor) -> torch.Tensor:
        return torch_ops.delta_weight(c, entries, shape, 2.5)

    assert torch.autograd.gradcheck(delta, (spectrum,))
    assert torch.autograd.gradgradcheck(delta, (spectrum,))


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
    merged = torch_ops.merged_weight(weight, spectrum, placed, 3.0)
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
