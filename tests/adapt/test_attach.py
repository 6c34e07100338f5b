"""Bundles onto live models and back: nothing lost, nothing accepted that does not fit."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fourierft_export import (
    Bundle,
    FourierFTConfig,
    attach,
    capture,
    detach,
    from_peft,
    fuse,
    inject,
    to_peft,
)
from fourierft_export.adapt.modules import adapter_names, fourier_layers
from fourierft_export.bundle.spec import LayerSpec
from fourierft_export.errors import BaseMismatchError, UsageError
from tests.adapt.helpers import MakeModel, adapted, output, structure

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"target_modules": "all-linear"}),
    ("bert-cls", {"task_type": "SEQ_CLS", "bias": "all", "n_frequency_pattern": {"query": 4}}),
    ("roberta-cls", {"task_type": "SEQ_CLS", "bias": "fourier_only"}),
    ("llama-tied", {"target_modules": ["lm_head", "q_proj"], "scaling": 150}),
    ("gpt2", {"target_modules": "all-linear", "bias": "fourier_only"}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_capture_then_attach_loses_nothing(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    trained = adapted(make_model(kind), **fields)
    bundle = capture(trained)
    assert bundle.is_bound
    assert {"classifier.weight", "classifier.out_proj.weight"} & set(bundle.saved) or (
        "task_type" not in fields
    )
    loaded = Bundle.load(bundle.save(tmp_path / "a.fourierft.safetensors"))
    model = attach(make_model(kind), loaded, "mine")
    assert not torch.equal(output(make_model(kind), tokens), output(trained, tokens))
    assert torch.equal(output(model, tokens), output(trained, tokens))
    assert capture(model, "mine").to_bytes() == bundle.to_bytes()


def test_attach_to_train_on(make_model: MakeModel, tokens: Tensor) -> None:
    bundle = capture(adapted(make_model("bert-cls"), task_type="SEQ_CLS"))
    model = attach(make_model("bert-cls"), bundle, trainable=True)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == len(bundle.spectra) + len(bundle.saved)
    output(model, tokens).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    detach(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_spectra_keep_their_dtype(make_model: MakeModel, tokens: Tensor, dtype: Any) -> None:
    bundle = capture(adapted(make_model("bert")))
    other = Bundle.build(bundle.spec, {k: v.astype(dtype) for k, v in bundle.spectra.items()})
    model = attach(make_model("bert"), other)
    assert capture(model).to_bytes() == other.to_bytes()
    rounded = {k: v.astype(np.float32) for k, v in other.spectra.items()}
    plain = attach(make_model("bert"), Bundle.build(bundle.spec, rounded))
    torch.testing.assert_close(output(model, tokens), output(plain, tokens), rtol=1e-5, atol=2e-6)


def test_explicit_entries(make_model: MakeModel, tokens: Tensor) -> None:
    bundle = capture(adapted(make_model("bert")))
    entries = {layer.name: bundle.entries(layer.name) for layer in bundle.layers}
    spec = dataclasses.replace(
        bundle.spec,
        seed=1,
        layers=tuple(dataclasses.replace(m, entry_rule="explicit") for m in bundle.layers),
    )
    explicit = Bundle.build(spec, bundle.spectra, explicit_entries=entries)
    model = attach(make_model("bert"), explicit)
    assert torch.equal(output(model, tokens), output(attach(make_model("bert"), bundle), tokens))
    assert capture(model).to_bytes() == explicit.to_bytes()


def unbound(bundle: Bundle) -> Bundle:
    layers = tuple(LayerSpec(m.name, m.n_frequency) for m in bundle.layers)
    return Bundle.build(
        dataclasses.replace(bundle.spec, layers=layers), bundle.spectra, bundle.saved
    )


def test_an_unbound_bundle_takes_shapes_from_the_model(
    make_model: MakeModel, tokens: Tensor
) -> None:
    bundle = capture(adapted(make_model("bert-cls"), task_type="SEQ_CLS", bias="all"))
    model = attach(make_model("bert-cls"), unbound(bundle))
    assert torch.equal(
        output(model, tokens), output(attach(make_model("bert-cls"), bundle), tokens)
    )
    assert capture(model).to_bytes() == bundle.to_bytes()


def test_a_head_adapter_on_the_bare_encoder(
    make_model: MakeModel, tokens: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    trained = adapted(make_model("bert-cls"), task_type="SEQ_CLS", bias="fourier_only")
    bare = make_model("bert-cls").bert
    with caplog.at_level(logging.WARNING):
        attach(bare, capture(trained))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "classifier.bias",
        "classifier.weight",
    ]
    assert torch.equal(output(bare, tokens), output(trained.bert, tokens))
    names = [layer.name for layer in capture(bare).layers]
    assert names[0] == "encoder.layer.0.attention.self.query"


def test_a_bare_adapter_on_the_task_model(make_model: MakeModel, tokens: Tensor) -> None:
    whole = make_model("bert-cls")
    bundle = capture(adapted(make_model("bert-cls").bert, bias="fourier_only"))
    attach(whole, bundle)
    assert next(iter(fourier_layers(whole))) == "bert.encoder.layer.0.attention.self.query"
    twin = attach(make_model("bert-cls").bert, bundle)
    assert torch.equal(output(whole.bert, tokens), output(twin, tokens))


def refused(model: nn.Module, bundle: Bundle, **kwargs: Any) -> BaseMismatchError:
    before = structure(model)
    with pytest.raises(BaseMismatchError) as caught:
        attach(model, bundle, **kwargs)
    assert structure(model) == before
    assert caught.value.exit_code == 4
    return caught.value


def test_another_base_is_refused_with_every_layer(make_model: MakeModel, tokens: Tensor) -> None:
    bundle = capture(adapted(make_model("bert")))
    other = make_model("bert")
    with torch.no_grad():
        for i in (0, 2):
            other.encoder.layer[i].attention.self.query.weight[3, 5] += 1e-3
    error = refused(other, bundle)
    assert [line.split(":")[0] for line in error.offenders] == [
        f"encoder.layer.{i}.attention.self.query" for i in (0, 2)
    ]
    assert "allow_base_mismatch" in error.remedy
    model = attach(other, bundle, allow_base_mismatch=True)
    assert adapter_names(model) == ("default",)
    assert not torch.equal(output(model, tokens), output(make_model("bert"), tokens))


def test_the_same_base_in_bfloat16_is_noted(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, tokens: Tensor
) -> None:
    trained = adapted(make_model("bert-cls"), task_type="SEQ_CLS")
    bundle = capture(trained)
    with caplog.at_level(logging.INFO):
        model = attach(make_model("bert-cls").bfloat16(), bundle)
    assert [record.getMessage() for record in caplog.records] == [
        "the adapter was trained on this base in another precision"
    ]
    found = output(model, tokens)
    assert found.dtype == torch.bfloat16
    assert (found - output(trained, tokens)).abs().max() < 0.02
    other = make_model("bert-cls").bfloat16()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    assert len(refused(other, bundle).offenders) == len(bundle.layers)


def test_shapes_layers_and_tensors_are_checked_even_then(make_model: MakeModel) -> None:
    from transformers import BertForSequenceClassification

    bundle = capture(adapted(make_model("bert-cls"), task_type="SEQ_CLS"))
    config = make_model("bert-cls").config
    config.num_labels, config.num_hidden_layers, config.hidden_size = 5, 2, 48
    smaller = BertForSequenceClassification(config)
    error = refused(smaller, bundle, allow_base_mismatch=True)
    assert len(error.offenders) == 6 + 2
    assert "bert.encoder.layer.0.attention.self.query: shape [32, 32] expected, found [48, 48]" in (
        error.offenders
    )
    assert any("layer.2.attention.self.value: no such layer" in o for o in error.offenders)
    assert "classifier.weight: shape [3, 32] expected, found [5, 48]" in error.offenders
    assert len(refused(smaller, unbound(bundle)).offenders) == 2 + 2


def test_a_weight_both_changed_and_replaced_is_refused(make_model: MakeModel) -> None:
    bundle = capture(adapted(make_model("bert-cls"), target_modules="all-linear"))
    path = bundle.layers[0].name
    weight = np.zeros(bundle.layers[0].shape or (), np.float32)
    both = Bundle.build(bundle.spec, bundle.spectra, {f"{path}.weight": weight})
    model = make_model("bert-cls")
    before = structure(model)
    with pytest.raises(UsageError, match="both") as caught:
        attach(model, both, trainable=True)
    assert caught.value.offenders == (f"{path}.weight",)
    assert structure(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_names_and_states_that_cannot_be(make_model: MakeModel) -> None:
    bundle = capture(adapted(make_model("bert")))
    model = attach(make_model("bert"), bundle)
    with pytest.raises(UsageError, match="already"):
        attach(model, bundle)
    with pytest.raises(UsageError, match="did you mean default"):
        capture(model, "defalt")
    with pytest.raises(UsageError):
        detach(model, "other")
    with pytest.raises(UsageError, match="restore"):
        attach(fuse(model), bundle, "second")
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(UsageError, match="meta"):
        attach(empty, bundle)
    inject(empty, FourierFTConfig(n_frequency=3))
    with pytest.raises(UsageError, match="meta"):
        capture(empty)


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_detach_gives_back_the_same_modules(
    make_model: MakeModel, tokens: Tensor, kind: str, fields: dict[str, Any]
) -> None:
    model = make_model(kind)
    before, weights = structure(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected = output(model, tokens)
    adapted(model, **fields)
    inject(model, FourierFTConfig(n_frequency=5, target_modules="all-linear"), "second")
    assert structure(model) != before
    detach(model)
    assert structure(model) == before
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(output(model, tokens), expected)
    assert all(p.requires_grad for p in model.parameters())
    assert detach(model) is model
    assert adapter_names(model) == ()


UNPACKED: list[tuple[str, dict[str, Any]]] = [
    ("bert-cls", {"task_type": "SEQ_CLS", "n_frequency_pattern": {"query": 7}}),
    ("bert-cls", {"task_type": "SEQ_CLS", "bias": "fourier_only"}),
    ("bert-cls", {"bias": "all", "modules_to_save": ["pooler"]}),
    ("roberta-cls", {"task_type": "SEQ_CLS"}),
    ("distilbert-cls", {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "lin1"]}),
    ("llama", {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear", "bias": "fourier_only"}),
]


@pytest.mark.parametrize(("kind", "fields"), UNPACKED)
def test_peft_loads_what_was_trained_here(
    make_model: MakeModel,
    tokens: Tensor,
    tmp_path: Path,
    kind: str,
    fields: dict[str, Any],
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    model = adapted(make_model(kind), **fields)
    bundle = capture(model)
    directory = to_peft(bundle, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(make_model(kind), directory).eval()
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=2e-6)

    again = tmp_path / "again"
    theirs.save_pretrained(again)
    before = load_file(directory / "adapter_model.safetensors")
    after = load_file(again / "adapter_model.safetensors")
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    back = from_peft(again)
    assert back.spectra.keys() == bundle.spectra.keys()
