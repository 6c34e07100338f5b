"""Injected adapters against PEFT's: same spectra, outputs, gradients, heads and biases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourierft_export import FourierFTConfig, FourierLinear, inject
from fourierft_export.adapt.modules import adapted_modules, fourier_layers
from tests.adapt.helpers import MakeModel, output

WithPeft = Callable[..., Any]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"target_modules": ["query", "value"]}),
    ("bert", {"target_modules": "all-linear", "n_frequency_pattern": {"query": 40}}),
    ("bert-cls", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    ("roberta-cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("distilbert-cls", {"target_modules": ["q_lin", "lin2"], "task_type": "SEQ_CLS"}),
    ("bert-cls", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    ("bert-cls", {"target_modules": ["query", "dense"], "bias": "fourier_only"}),
    ("llama", {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "up_proj"]}),
    ("llama-tied", {"target_modules": ["lm_head", "v_proj"]}),
    ("llama-cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "fourier_only", "fan_in_fan_out": True}),
]
IDS = [f"{kind}-{i}" for i, (kind, _) in enumerate(CASES)]


def plain_name(name: str) -> str | None:
    """A PEFT parameter's name as (base path).(leaf), for those that the adapter owns."""
    name = name.removeprefix("base_model.model.")
    if "original_module" in name:
        return None
    name = name.replace(".fourierft_spectrum.default", ".spectrum")
    return name.replace(".modules_to_save.default", "").replace(".base_layer", "")


def own_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """(base path).(leaf) -> parameter, of our adapter."""
    found = {}
    for path, layer in fourier_layers(model).items():
        if name in layer.adapters:
            found[f"{path}.spectrum"] = layer.adapter(name).spectrum
    for path, module in adapted_modules(model).items():
        if name in module.versions:
            for leaf, tensor in module.version(name).own_tensors().items():
                found[f"{path}.{leaf}"] = tensor
    return found


@pytest.fixture(params=CASES, ids=IDS)
def pair(
    request: pytest.FixtureRequest, make_model: MakeModel, with_peft: WithPeft
) -> tuple[nn.Module, Any]:
    """(ours, PEFT's) from the same base, configuration and random state."""
    kind, fields = request.param
    fields = {"n_frequency": 30, "scaling": 20.0, "random_loc_seed": 11} | fields
    theirs = with_peft(make_model(kind), seed=4, **fields)
    torch.manual_seed(4)
    return inject(make_model(kind), FourierFTConfig(**fields)), theirs


def test_spectra_outputs_and_gradients_are_pefts(
    pair: tuple[nn.Module, Any], tokens: Tensor, make_model: MakeModel
) -> None:
    ours, theirs = pair
    mine = own_parameters(ours)
    wanted = {plain_name(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    wanted.pop(None, None)
    assert mine.keys() == wanted.keys()
    for name, parameter in mine.items():
        assert torch.equal(parameter, wanted[name]), name

    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == len(mine)

    with torch.no_grad():  # heads and biases away from where the base has them
        generator = torch.Generator().manual_seed(1)
        for name, parameter in mine.items():
            if not name.endswith("spectrum"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                wanted[name].copy_(parameter)
    expected, found = output(theirs, tokens), output(ours, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)

    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (expected * target).sum().backward()
    (found * target).sum().backward()
    for name, parameter in mine.items():
        if wanted[name].grad is None:  # the output does not depend on it
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        scale = wanted[name].grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, wanted[name].grad, rtol=1e-4, atol=2e-5 * scale + 1e-7
        )
    assert all(p.grad is None for n, p in ours.named_parameters() if n not in trained)


def test_zero_start_leaves_the_model_unchanged(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("bert-cls")
    before = output(model, tokens)
    inject(model, FourierFTConfig(n_frequency=30, task_type="SEQ_CLS", init_weights=True))
    assert torch.equal(output(model, tokens), before)
    inject(model, FourierFTConfig(n_frequency=30), "random")
    assert (output(model, tokens) - before).abs().max() > 1e-3


def test_drawing_leaves_the_generator_where_peft_leaves_it(
    make_model: MakeModel, with_peft: WithPeft
) -> None:
    for zeros in (True, False):
        fields = {"n_frequency": 30, "target_modules": ["query"], "init_weights": zeros}
        with_peft(make_model("bert"), seed=8, **fields)
        expected = torch.rand(3)
        torch.manual_seed(8)
        inject(make_model("bert"), FourierFTConfig(**fields))
        assert torch.equal(torch.rand(3), expected)


def test_all_linear_leaves_the_tasks_head_whole(make_model: MakeModel, tokens: Tensor) -> None:
    """PEFT itself fails here: it adapts the classifier, then wants to save it whole."""
    config = FourierFTConfig(n_frequency=9, target_modules="all-linear", task_type="TOKEN_CLS")
    model = inject(make_model("bert-token"), config)
    assert "classifier" not in fourier_layers(model)
    assert list(adapted_modules(model)) == ["classifier"]
    assert output(model, tokens).shape == (3, 9, 4)


def test_any_torch_model_with_linear_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))
    config = FourierFTConfig(n_frequency=8, target_modules=["0"], modules_to_save=["1", "3"])
    inject(model, config)
    assert isinstance(model[0], FourierLinear)
    x = torch.randn(7, 12)
    running = model[1].original.running_mean.clone()
    model.train()(x).sum().backward()
    assert torch.equal(model[1].original.running_mean, running)
    assert not torch.equal(model[1].running_mean, running)
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    assert len(names) == 5


def test_layers_that_torch_reads_instead_of_calling() -> None:
    """The output projection of attention; in the fast path without gradients, all of them."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    config = FourierFTConfig(n_frequency=20, target_modules="all-linear", bias="all")
    reference = copy.deepcopy(model)
    inject(model, config)
    assert list(fourier_layers(model)) == ["self_attn.out_proj", "linear1", "linear2"]
    with torch.no_grad():
        for path, layer in fourier_layers(model).items():
            reference.get_submodule(path).weight += layer.adapter("default").delta_weight()
        for name, parameter in own_parameters(model).items():
            if name.endswith("bias"):
                parameter.add_(0.5)
                reference.get_parameter(name).add_(0.5)
    assert (reference(x) - model(x)).abs().max() < 1e-5
    with torch.no_grad():
        assert (reference(x) - model(x)).abs().max() < 1e-5
    model(x).sum().backward()
    for name, parameter in own_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
