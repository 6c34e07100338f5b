"""Any module that maps in_features to out_features can have an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourierft_export import (
    FourierFTConfig,
    FourierLinear,
    capture,
    export_onnx,
    inject,
)
from fourierft_export.adapt.modules import fourier_layers
from fourierft_export.errors import UsageError
from fourierft_export.spectral import cost
from tests.adapt.helpers import exact_delta


class Ternary(nn.Module):
    """A user's own layer: signs of the weight in int8, one scale per row. Gradients pass."""

    signs: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().mean(1))
        self.register_buffer("signs", (weight / self.scale[:, None]).round().clamp(-1, 1).char())
        self.register_buffer("bias", linear.bias.detach().clone())

    def float_weight(self) -> Tensor:
        return self.signs * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.float_weight().to(x.dtype), self.bias.to(x.dtype))


def dynamic_int8(linear: nn.Linear) -> nn.Module:
    """torch's own quantised layer: no parameters, weight and bias are methods, no gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})
    return module[0]


def float_values(base: nn.Module) -> Tensor:
    """W as the layer computes with it, in float64."""
    if isinstance(base, Ternary):
        return base.float_weight().double()
    return base.weight().dequantize().double()


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {"own": Ternary, "dynamic": dynamic_int8}


class Net(nn.Module):
    """Two layers: the first as given, the second a plain one."""

    def __init__(self, kind: str | None, hidden: int = 20) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Linear(12, hidden)
        self.first: nn.Module = first if kind is None else KINDS[kind](first)
        self.last = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.first(x)))
        return out


FIELDS: dict[str, Any] = {"n_frequency": 30, "scaling": 40.0, "target_modules": ["first"]}


def adapted(kind: str | None, **fields: Any) -> Net:
    model = Net(kind)
    torch.manual_seed(1)
    return inject(model, FourierFTConfig(**(FIELDS | fields)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", cost.FORMS)
@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_output_is_the_bases_plus_the_change(
    kind: str, form: str, leading: tuple[int, ...]
) -> None:
    model = adapted(kind)
    layer = fourier_layers(model)["first"]
    assert (layer.in_features, layer.out_features) == (12, 20)
    assert layer.adapter("default").spectrum.dtype == torch.float32
    x = torch.randn(*leading, 12)
    base = layer.base_layer(x)
    with cost.force(form=form):
        found = layer(x)
    expected = base.double() + x.double() @ exact_delta(layer).T
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    if kind == "own":
        whole = x.double() @ (float_values(layer.base_layer) + exact_delta(layer)).T
        bias = layer.bias
        assert bias is not None
        torch.testing.assert_close(found.double(), whole + bias.double(), rtol=3e-6, atol=3e-6)


def test_a_scripted_layer_is_a_base() -> None:
    linear = nn.Linear(6, 4)
    model = nn.Sequential(torch.jit.script(linear))
    inject(model, FourierFTConfig(n_frequency=5, target_modules="all-linear"))
    x = torch.randn(3, 6)
    delta = fourier_layers(model)["0"].adapter("default").delta_weight()
    torch.testing.assert_close(model(x), linear(x) + x @ delta.T)


def test_a_head_with_sizes_is_no_quantised_layer() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 6, 2
            self.dense = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.dense(x)

    model = nn.Sequential(nn.Linear(6, 6), Head())
    config = FourierFTConfig(n_frequency=5, target_modules=["0"], modules_to_save=["1"])
    assert capture(inject(model, config)).saved.keys() == {"1.dense.weight", "1.dense.bias"}


class TwoAnswers(Ternary):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Wider(Ternary):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :1]


@pytest.mark.parametrize(("kind", "found"), [(TwoAnswers, "tuple"), (Wider, r"\[3, 1\]")])
def test_answers_that_nothing_can_be_added_to(kind: type[Ternary], found: str) -> None:
    model = nn.Sequential(kind(nn.Linear(12, 20)))
    inject(model, FourierFTConfig(n_frequency=5, target_modules=["0"]))
    with pytest.raises(UsageError, match=found):
        model(torch.randn(3, 12))


class Block(nn.Module):
    """A block with in_features and out_features, as many have."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 12, 5
        self.up = nn.Linear(12, 20)
        self.down = Ternary(nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def test_all_linear_takes_layers_not_blocks() -> None:
    model = nn.Sequential(Block(), nn.Linear(5, 5))
    inject(model, FourierFTConfig(n_frequency=5, target_modules="all-linear"))
    assert list(fourier_layers(model)) == ["0.up", "0.down", "1"]
    again = nn.Sequential(Block(), nn.Linear(5, 5))
    inject(again, FourierFTConfig(n_frequency=5, target_modules=["0"]))
    assert list(fourier_layers(again)) == ["0"]
    x = torch.randn(3, 12)
    layer = fourier_layers(again)["0"]
    expected = layer.base_layer(x).double() + x.double() @ exact_delta(layer).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-6, atol=2e-6)


class Sizes(nn.Module):
    """Sizes that are no sizes."""

    def __init__(self, in_features: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, 5

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("size", [0, -1, 2.0, None, True, (3, 4)])
def test_sizes_must_be_positive_integers(size: Any) -> None:
    with pytest.raises(UsageError, match="Sizes"):
        FourierLinear(Sizes(size))
    with pytest.raises(UsageError, match="target_modules") as caught:
        inject(nn.Sequential(Sizes(size)), FourierFTConfig(target_modules=["0"]))
    assert caught.value.offenders == ("0: Sizes",)


def test_a_quantised_head_cannot_be_saved_whole() -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(12, 12))
    model.add_module("own", Ternary(nn.Linear(12, 5)))
    with pytest.raises(UsageError, match="modules_to_save") as caught:
        inject(
            model,
            FourierFTConfig(n_frequency=5, target_modules=["body"], modules_to_save=["own"]),
        )
    assert caught.value.offenders == ("own: Ternary",)
    assert isinstance(model.body, nn.Linear)


@pytest.mark.parametrize("mode", ["merged", "unmerged", "swappable"])
def test_export_is_refused_with_the_layers(mode: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unquantised checkpoint") as caught:
        export_onnx(adapted("own"), (torch.randn(2, 12),), tmp_path / "a.onnx", mode=mode)
    assert caught.value.offenders == ("first: Ternary",)
    assert list(tmp_path.iterdir()) == []
