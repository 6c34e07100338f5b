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
