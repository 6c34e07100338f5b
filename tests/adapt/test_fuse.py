"""fuse, restore, and plain layers in the place of adapted ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourierft_export import FourierFTConfig, fuse, inject, restore
from fourierft_export.adapt.active import activate
from fourierft_export.adapt.modules import active_adapters, fourier_layers
from fourierft_export.errors import UsageError
from fourierft_export.spectral.delta import reference_delta

MakeModel = Callable[[str], nn.Module]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert-cls", {"task_type": "SEQ_CLS", "bias": "all", "target_modules": "all-linear"}),
    ("llama-tied", {"target_modules": ["lm_head", "v_proj"]}),
    ("gpt2", {"target_modules": "all-linear", "bias": "fourier_only"}),
]


def output(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits


def adapted(model: nn.Module, name: str = "default", **fields: Any) -> nn.Module:
    torch.manual_seed(2)
    inject(model, FourierFTConfig(**({"n_frequency": 21, "scaling": 30.0} | fields)), name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize(("kind", "fields"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fuse_and_restore(
    make_model: MakeModel, tokens: Tensor, kind: str, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = adapted(make_model(kind), **fields).to(dtype)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    base, unfused = output(make_model(kind).to(dtype), tokens), output(model, tokens)
    assert fuse(model) is model
    fused = output(model, tokens)
    scale = unfused.abs().max()
    assert (fused - unfused).abs().max() <= 16 * torch.finfo(dtype).eps * scale
    assert (fused - base).abs().max() > 0.05 * scale
    assert not any(a.spectrum.requires_grad for a in adapters(model))
    assert model.state_dict().keys() == state.keys()
    restore(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(output(model, tokens), unfused)
    assert all(a.spectrum.requires_grad for a in adapters(model))


def adapters(model: nn.Module) -> list[Any]:
    return [layer.adapter("default") for layer in fourier_layers(model).values()]


def test_fused_weights_are_w_plus_delta(make_model: MakeModel) -> None:
    model = adapted(make_model("gpt2"), target_modules="all-linear")
    fuse(model)
    for path, layer in fourier_layers(model).items():
        adapter = layer.adapter("default")
        delta = torch.from_numpy(
            reference_delta(
                adapter.spectrum.detach().numpy(),
                adapter.host_entries,
                adapter.shape,
                adapter.origin.scaling,
            )
        )
        exact = make_model("gpt2").get_submodule(path).weight.double() + delta.T
        assert layer.is_fused and layer.weight.dtype == torch.float32
        atol = 1e-6 * delta.abs().max().item()
        torch.testing.assert_close(layer.weight.double(), exact, rtol=6e-8, atol=atol)


def test_a_tied_embedding_stays_as_it_is(make_model: MakeModel) -> None:
    model = adapted(make_model("llama-tied"), target_modules=["lm_head"])
    before = model.model.embed_tokens.weight.clone()
    fuse(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, before)


def test_names_choose_what_is_fused(make_model: MakeModel, tokens: Tensor) -> None:
    model = adapted(adapted(make_model("llama"), "a"), "b", random_loc_seed=3)
    outputs = {}
    for names in ("a", "b", ["a", "b"], ["b", "a"]):
        outputs[str(names)] = output(activate(model, names), tokens)
        activate(model, [])
        fuse(model, names)
        assert active_adapters(model) == ((names,) if isinstance(names, str) else tuple(names))
        torch.testing.assert_close(output(model, tokens), outputs[str(names)], rtol=1e-5, atol=1e-6)
        restore(model)
    assert (outputs["a"] - outputs["b"]).abs().max() > 1e-3


def test_what_is_refused(make_model: MakeModel) -> None:
    model = adapted(make_model("bert-cls"))
    with pytest.raises(UsageError, match="not"):
        restore(model)
    with pytest.raises(UsageError, match="adapter"):
        fuse(model, "other")
    fuse(model)
    with pytest.raises(UsageError, match="model that is fused"):
        fuse(model)
    for call in (
        lambda: activate(model, []),
        lambda: inject(model, FourierFTConfig(n_frequency=3), "b"),
    ):
        with pytest.raises(UsageError, match="restore"):
            call()
    restore(model)
    with pytest.raises(UsageError, match="active"):
        fuse(activate(model, []))
    with pytest.raises(UsageError):
        fuse(make_model("bert-cls"))


def test_overflow_in_float16_names_every_layer(make_model: MakeModel) -> None:
    model = adapted(make_model("bert-cls"), scaling=1e9).half()
    activate(model, [])
    with pytest.raises(UsageError) as caught:
        fuse(model, "default")
    assert active_adapters(model) == ()
    assert len(caught.value.offenders) == 6
    assert "bert.encoder.layer.0.attention.self.query.weight" in caught.value.offenders[0]
    assert not any(layer.is_fused for layer in fourier_layers(model).values())


def test_fused_models_are_copied_and_moved(make_model: MakeModel, tokens: Tensor) -> None:
    model = fuse(adapted(make_model("bert-cls")))
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, tokens), output(model, tokens))
    assert output(twin.double(), tokens).dtype == torch.float64
