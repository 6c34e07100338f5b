"""Adapters on layers that torchao and bitsandbytes quantised: outputs, gradients, training."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourierft_export import (
    Bundle,
    FourierFTConfig,
    attach,
    capture,
    detach,
    fuse,
    inject,
    restore,
)
from fourierft_export.adapt.modules import fourier_layers
from fourierft_export.errors import UsageError
from fourierft_export.spectral import cost
from tests.adapt.helpers import MakeModel, exact_delta

pytestmark = pytest.mark.filterwarnings("ignore:::(torchao|bitsandbytes)")

TARGETS = ("q_proj", "v_proj", "down_proj")
FIELDS: dict[str, Any] = {"n_frequency": 60, "scaling": 20.0, "target_modules": list(TARGETS)}


def with_torchao(model: nn.Module, config: str, **fields: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization

        quantization.quantize_(
            model,
            getattr(quantization, config)(**fields),
            lambda m, path: isinstance(m, nn.Linear) and not path.endswith("lm_head"),
        )
    return model


def with_bitsandbytes(model: nn.Module, bits: int) -> nn.Module:
    """As transformers does it: every linear layer but the output's replaced by one of theirs."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for path, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or path.endswith("lm_head"):
            continue
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        if bits == 8:
            quantised = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            dtype = linear.weight.dtype
            quantised = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
        quantised.load_state_dict(linear.state_dict())
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, quantised.to("cpu"))
    return model


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao-int8": lambda m: with_torchao(m, "Int8WeightOnlyConfig"),
    "torchao-int4": lambda m: with_torchao(m, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao-float8": lambda m: with_torchao(m, "Float8WeightOnlyConfig"),
    "bitsandbytes-8bit": lambda m: with_bitsandbytes(m, 8),
    "bitsandbytes-4bit": lambda m: with_bitsandbytes(m, 4),
}


def float_values(linear: nn.Module) -> Tensor:
    """The weight that a quantised layer stands for, in float64."""
    weight: Any = linear.weight
    if type(linear).__name__ == "Linear8bitLt":
        return weight.double() * linear.state.SCB.double()[:, None] / 127
    if type(linear).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).double()
    return weight.dequantize().double()


@pytest.fixture(params=KINDS)
def quantised(
    request: pytest.FixtureRequest, make_model: MakeModel
) -> Iterator[Callable[..., nn.Module]]:
    """`make(dtype)`: a small Llama whose layers are quantised."""

    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        model = KINDS[request.param](make_model("llama").to(dtype))
        return model.requires_grad_(False)

    return make


def adapted(model: nn.Module, name: str = "default", **fields: Any) -> nn.Module:
    torch.manual_seed(1)
    return inject(model, FourierFTConfig(**(FIELDS | fields)), name)


def first(model: nn.Module) -> Any:
    return next(iter(fourier_layers(model).values()))


@pytest.mark.parametrize("form", cost.FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(
    quantised: Callable[..., nn.Module], form: str, dtype: torch.dtype
) -> None:
    layer = first(adapted(quantised(dtype)))
    spectrum = layer.adapter("default").spectrum
    assert spectrum.dtype == torch.float32
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 32, generator=generator).to(dtype).requires_grad_()
    target = torch.randn(2, 9, 32, generator=generator).to(dtype)
    base = layer.base_layer(x.detach())
    with cost.force(form=form):
        found = layer(x)
        (found * target).sum().backward()
    delta = exact_delta(layer)
    eps = torch.finfo(dtype).eps
    expected = base.double() + x.detach().double() @ delta.T
    assert found.dtype == base.dtype
    assert (found.double() - expected).abs().max() <= 8 * eps * expected.abs().max()
    assert (expected - base).abs().max() > 0.2

    whole = float_values(layer.base_layer) + delta
    by_x = target.double() @ whole
    assert (x.grad.double() - by_x).abs().max() <= 16 * eps * by_x.abs().max()
    by_delta = target.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1)
    places = torch.tensor(layer.adapter("default").host_entries)
    by_spectrum = torch.fft.fft2(by_delta).real[places[:, 0], places[:, 1]] * 20.0 / 32**2
    error = (spectrum.grad.double() - by_spectrum).abs().max()
    assert error <= 16 * eps * by_spectrum.abs().max()


def test_bundles_copies_states_and_detaching(
    quantised: Callable[..., nn.Module], tokens: Tensor, tmp_path: Path
) -> None:
    model = adapted(quantised())
    expected = model(input_ids=tokens).logits
    bundle = Bundle.load(capture(model).save(tmp_path / "a.fourierft.safetensors"))
    assert bundle.is_bound
    assert all(m.fingerprint is None for m in bundle.layers)
    other = attach(quantised(), bundle)
    assert torch.equal(other(input_ids=tokens).logits, expected)
    assert capture(other).to_bytes() == bundle.to_bytes()
    assert torch.equal(copy.deepcopy(model)(input_ids=tokens).logits, expected)
    plain = quantised()
    names = [n for n, _ in plain.named_modules()]
    logits = plain(input_ids=tokens).logits
    assert not torch.equal(logits, expected)
    attach(plain, bundle)
    detach(plain)
    assert torch.equal(plain(input_ids=tokens).logits, logits)
    assert [n for n, _ in plain.named_modules()] == names


def test_a_float_adapter_and_a_quantised_base(
    quantised: Callable[..., nn.Module],
    make_model: MakeModel,
    tokens: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Either way round: outputs differ by what quantisation alone makes of the base."""
    trained = adapted(make_model("llama"))
    bundle = capture(trained)
    assert all(m.fingerprint is not None for m in bundle.layers)
    with caplog.at_level(logging.INFO):
        model = attach(quantised(), bundle)
    assert "no check was possible that it belongs to this base" in caplog.text
    with torch.no_grad():
        exact = trained(input_ids=tokens).logits
        base = make_model("llama")(input_ids=tokens).logits
        rough = quantised()(input_ids=tokens).logits
        found = model(input_ids=tokens).logits
        back = fuse(attach(make_model("llama"), capture(model)))(input_ids=tokens).logits
    assert (found - exact).norm() <= 2 * (rough - base).norm()
    assert (exact - base).norm() > 2 * (rough - base).norm()
    torch.testing.assert_close(back, exact, rtol=1e-4, atol=1e-5)


def test_what_needs_a_weight_is_refused(
    quantised: Callable[..., nn.Module], tokens: Tensor
) -> None:
    model = adapted(quantised())
    before = model(input_ids=tokens).logits
    with pytest.raises(UsageError, match="unquantised checkpoint") as caught:
        fuse(model)
    assert len(caught.value.offenders) == 9
    with pytest.raises(UsageError):
        _ = first(model).weight
    assert torch.equal(model(input_ids=tokens).logits, before)
    adapted(model, "head", target_modules=["lm_head"])
    restore(fuse(model, "head"))  # the only float layer


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4"])
def test_state_dicts(make_model: MakeModel, tokens: Tensor, tmp_path: Path, kind: str) -> None:
    model = adapted(KINDS[kind](make_model("llama")))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = adapted(KINDS[kind](make_model("llama")), init_weights=True)
    assert not torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_float_head_on_a_quantised_body(make_model: MakeModel, tokens: Tensor) -> None:
    """What a classifier has: quantised layers, a head that learns whole, biases that do."""
    from torchao import quantization

    model = make_model("bert-cls")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        lambda m, path: isinstance(m, nn.Linear) and "classifier" not in path,
    )
    twin = copy.deepcopy(model)
    everywhere = make_model("bert-cls")
    quantization.quantize_(everywhere, quantization.Int8WeightOnlyConfig())
    config = FourierFTConfig(n_frequency=9, task_type="SEQ_CLS", bias="fourier_only")
    inject(model, config)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert len(learning) == 6 + 6 + 2
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=torch.tensor([0, 1, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    expected = model(input_ids=tokens).logits
    assert torch.equal(attach(twin, capture(model))(input_ids=tokens).logits, expected)
    with pytest.raises(UsageError, match="modules_to_save") as caught:
        inject(everywhere, config)
    assert caught.value.offenders == ("classifier: Linear with a weight of Int8Tensor (float32)",)
