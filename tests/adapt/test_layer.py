"""FourierLinear by itself: against float64, in every dtype, under autocast."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fourierft_export import FourierLinear
from fourierft_export.bundle.spec import AdapterSpec
from fourierft_export.errors import UsageError
from fourierft_export.spectral import cost


def float64_delta(spectrum: Tensor, shape: tuple[int, int], seed: int, scaling: float) -> Tensor:
    """delta_W by its definition, entries from torch.randperm."""
    rows, columns = shape
    places = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    u, v = (a.numpy() for a in (places // columns, places % columns))
    delta = np.zeros(shape)
    p, q = np.arange(rows)[:, None], np.arange(columns)[None, :]
    for c, a, b in zip(spectrum.double().tolist(), u, v, strict=False):
        delta += c * np.cos(2 * np.pi * (a * p / rows + b * q / columns))
    return torch.from_numpy(delta * scaling / (rows * columns))


def make(
    dtype: torch.dtype = torch.float32, conv1d: bool = False, shape: tuple[int, int] = (24, 18)
) -> tuple[FourierLinear, nn.Module, Tensor]:
    """(layer with adapters a and b, its base, delta_a + delta_b in float64)."""
    torch.manual_seed(0)
    rows, columns = shape
    base = Conv1D(rows, columns) if conv1d else nn.Linear(columns, rows)
    base = base.to(dtype)
    nn.init.normal_(base.bias)
    layer = FourierLinear(copy.deepcopy(base))
    total = torch.zeros(shape, dtype=torch.float64)
    for name, n, seed, scaling in (("a", 31, 7, 60.0), ("b", 12, 2**32 - 1, 25)):
        spectrum = torch.randn(n)
        layer.add_adapter(name, spectrum, AdapterSpec(seed, scaling, ()))
        total += float64_delta(spectrum, shape, seed, scaling)
    layer.active = ("a", "b")
    return layer, base, total


def expected(base: nn.Module, delta: Tensor, x: Tensor) -> Tensor:
    weight = base.weight.double()
    weight = weight.T if isinstance(base, Conv1D) else weight
    return x.double() @ (weight + delta).T + base.bias.double()


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (2, 1, 4)])
@pytest.mark.parametrize("form", cost.FORMS)
def test_output_is_that_of_the_sum(conv1d: bool, leading: tuple[int, ...], form: str) -> None:
    layer, base, delta = make(conv1d=conv1d)
    x = torch.randn(*leading, 18)
    with cost.force(form=form):
        found = layer(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(base, delta, x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("form", cost.FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, form: str, conv1d: bool) -> None:
    layer, base, delta = make(dtype, conv1d)
    x = torch.randn(5, 18).to(dtype)
    with cost.force(form=form):
        found = layer(x)
    assert found.dtype == dtype
    # The base rounds its own result once, the sum is rounded once more.
    ulp = torch.finfo(dtype).eps
    bound = {torch.float64: 1e-5}.get(dtype, 2 * ulp)
    reference = expected(base, delta, x)
    assert (found.double() - reference).abs().max() <= bound * reference.abs().max()


@pytest.mark.parametrize("form", cost.FORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_change_below_the_bases_precision_is_kept(form: str, autocast: bool) -> None:
    """W + delta_W rounded to bfloat16 would lose it; that is why it is not formed there."""
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, base, _ = make(dtype)
    layer.active = ("a",)
    with torch.no_grad():
        base.weight.fill_(1.0)
        base.bias.zero_()
        layer.base_layer.load_state_dict(base.state_dict())
        spectrum = layer.adapter("a").spectrum
        spectrum.mul_(1e-3 / layer.delta_weight().abs().max())
    x = torch.zeros(1, 18, dtype=dtype)
    x[0, 0], x[0, 1] = 1.0, -1.0  # the base answers 0
    delta = float64_delta(spectrum, (24, 18), 7, 60.0)
    wanted = delta[:, 0] - delta[:, 1]
    with cost.force(form=form), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    # Under autocast delta_W itself is rounded before the product, as torch does with any weight.
    bound = torch.finfo(torch.bfloat16).eps * (delta[:, :2].abs().max() if autocast else 1e-3)
    assert (found[0].double() - wanted).abs().max() <= 2 * bound


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(base_dtype: torch.dtype) -> None:
    layer, base, delta = make(base_dtype)
    x = torch.randn(5, 18)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        plain = base(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    reference = expected(base, delta, x)
    error = (found.double() - reference).abs().max()
    assert error <= 4 * torch.finfo(torch.bfloat16).eps * reference.abs().max()
    found.float().sum().backward()
    grad = layer.adapter("a").spectrum.grad
    assert grad is None  # nothing requires gradients
    layer.adapter("a").spectrum.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert layer.adapter("a").spectrum.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_weight_is_rounded_once(dtype: torch.dtype) -> None:
    layer, base, delta = make(dtype)
    exact = base.weight.double() + delta
    found = layer.effective_weight()
    assert found.dtype == dtype
    ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact.abs())))
    assert ((found.double() - exact).abs() <= ulp / 2 + 1e-6 * delta.abs().max()).all()


def test_copies_and_pickles_of_a_layer_made_by_hand() -> None:
    layer, x = make()[0], torch.randn(5, 18)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_other_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="Conv2d"):
        FourierLinear(nn.Conv2d(3, 3, 1))
    layer, _, _ = make()
    with pytest.raises(UsageError):
        layer.add_adapter("a", torch.zeros(3), AdapterSpec(1, 1.0, ()))
    with pytest.raises(UsageError):
        layer.add_adapter("c", torch.zeros(24 * 18 + 1), AdapterSpec(1, 1.0, ()))
