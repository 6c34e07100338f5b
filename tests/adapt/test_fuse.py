"""fuse, restore, and plain layers in the place of adapted ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourierft_export import FourierFTConfig, fuse, inject, restore
from fourierft_export.adapt.active import activate
from fourierft_export.adapt.modules import active_adapters, fourier_layers
from fourierft_export.errors import UsageError
from tests.adapt.helpers import MakeModel, adapted, output

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert-cls", {"task_type": "SEQ_CLS", "bias": "all", "target_modules": "all-linear"}),
    ("llama-tied", {"target_modules": ["lm_head", "v_proj"]}),
    ("gpt2", {"target_modules": "all-linear", "bias": "fourier_only"}),
]


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
