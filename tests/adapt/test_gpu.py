"""The same on a CUDA device as on the CPU (left out unless asked for with -m gpu)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourierft_export import FourierFTConfig, attach, capture, detach, fuse, inject, restore
from fourierft_export.spectral import cost

pytestmark = pytest.mark.gpu


def run(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens.to(next(model.parameters()).device)).logits


@pytest.mark.parametrize("form", cost.FORMS)
@pytest.mark.parametrize("kind", ["bert-cls", "gpt2"])
def test_outputs_gradients_and_bundles(
    make_model: Callable[[str], nn.Module], tokens: Tensor, kind: str, form: str
) -> None:
    config = FourierFTConfig(n_frequency=25, scaling=20.0, bias="fourier_only")
    torch.manual_seed(3)
    model = inject(make_model(kind), config)
    with cost.force(form=form):
        expected = run(model, tokens)
        expected.sum().backward()
        learning = [p for p in model.parameters() if p.requires_grad]
        gradients = [p.grad for p in learning]
        model.zero_grad()
        model.cuda()
        found = run(model, tokens)
        found.sum().backward()
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
        for parameter, gradient in zip(learning, gradients, strict=True):
            assert parameter.grad is not None
            bound = 1e-3 * gradient.abs().max().item() + 1e-6
            torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-3, atol=bound)
    bundle = capture(model)
    assert bundle.to_bytes() == capture(model.cpu()).to_bytes()
    other = attach(make_model(kind).cuda(), bundle)
    torch.testing.assert_close(run(other, tokens).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(fuse(other), tokens).cpu(), expected, rtol=1e-4, atol=1e-4)
    detach(restore(other))
    assert all(
        torch.equal(a.cpu(), b)
        for a, b in zip(
            other.state_dict().values(), make_model(kind).state_dict().values(), strict=True
        )
    )
