"""Weighted sums of adapters: against the sum of their delta_W in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fourierft_export import (
    activate,
    attach,
    capture,
    combine,
    detach,
    fuse,
    restore,
    route,
)
from fourierft_export.adapt.modules import active_adapters, adapter_names, fourier_layers
from fourierft_export.errors import UsageError
from tests.adapt.helpers import MakeModel, adapted, exact_delta


@pytest.fixture
def model(make_model: MakeModel) -> nn.Module:
    """bert-cls with adapters that share entries, or parts of them, or none."""
    model = make_model("bert-cls")
    adapted(model, "a")
    adapted(model, "b", scaling=7.5)
    adapted(model, "few", n_frequency=9)
    adapted(model, "seed", random_loc_seed=6, target_modules="all-linear")
    adapted(model, "full", random_loc_seed=7, n_frequency=1024)
    adapted(model, "head", task_type="SEQ_CLS", bias="fourier_only")
    adapted(model, "head2", task_type="SEQ_CLS", random_loc_seed=6)
    return model


def logits(model: Any) -> Tensor:
    tokens = torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        return model(input_ids=tokens).logits


SHARED: list[dict[str, float]] = [
    {"a": 0.7},
    {"a": 1.5, "b": -0.25},
    {"few": 0.5, "a": 2},
    {"b": 0.1, "few": 3.0, "a": -1e-3},
]
UNITED: list[dict[str, float]] = [
    {"a": 1.0, "seed": 0.5},
    {"seed": -2.0, "few": 1.0, "b": 0.3},
    {"full": 0.5, "a": 0.5},
]


@pytest.mark.parametrize("weights", [SHARED[1], UNITED[1]], ids=["shared", "united"])
def test_the_model_answers_with_the_sum(model: nn.Module, weights: dict[str, float]) -> None:
    layers = fourier_layers(model)
    activate(model, [])
    before = {path: layer.base_layer.weight.detach() for path, layer in layers.items()}
    for path, layer in layers.items():
        there = {name: weight for name, weight in weights.items() if name in layer.adapters}
        delta = sum(weight * exact_delta(layer, name) for name, weight in there.items())
        layer.base_layer.weight.data = (before[path].double() + delta).float()
    expected = logits(model)
    for path, weight in before.items():
        layers[path].base_layer.weight.data = weight
    combine(model, weights, "sum")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(fuse(model)), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), route(restore(model), ["sum", "a", "sum"]):
        tokens = torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(6))
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-6)
    detach(model, "sum")
    combine(model, weights, "sum")  # the name may be used again
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_one_brings_is_taken_as_it_is(model: nn.Module) -> None:
    head = capture(model, "head")
    combine(model, {"a": 0.5, "head": 0.25}, "sum")
    found = capture(model, "sum").saved
    assert found.keys() == head.saved.keys()
    assert all(found[name].tobytes() == head.saved[name].tobytes() for name in found)


def test_heads_of_several(model: nn.Module) -> None:
    weights = {"head": 3.0, "a": 5.0, "head2": 1.0}
    with pytest.raises(UsageError, match="average") as caught:
        combine(model, weights, "sum")
    assert caught.value.offenders == (
        "classifier.bias: in head, head2",
        "classifier.weight: in head, head2",
    )
    assert "sum" not in adapter_names(model)
    one, two = capture(model, "head").saved, capture(model, "head2").saved
    found = capture(combine(model, weights, "mean", heads="average"), "mean").saved
    assert found.keys() == one.keys() > two.keys()
    for name, tensor in found.items():
        wanted = one[name]
        if name in two:
            wanted = (3.0 * one[name].astype(np.float64) + two[name]) / 4.0
        np.testing.assert_allclose(tensor, wanted, rtol=1e-6, atol=1e-8)
    found = capture(combine(model, weights, "second", heads="head2"), "second").saved
    assert found.keys() == two.keys()
    assert all(found[name].tobytes() == two[name].tobytes() for name in found)
    with pytest.raises(UsageError, match="sum is not 0"):
        combine(model, {"head": 1, "head2": -1}, "zero", heads="average")
    # Heads that agree are no question.
    attach(model, capture(model, "head2"), "again")
    found = capture(combine(model, {"head2": 1, "again": 1}, "twice"), "twice").saved
    assert all(found[name].tobytes() == two[name].tobytes() for name in found)


def test_trained_on(model: nn.Module) -> None:
    combine(model, {"a": 1, "seed": 1}, "sum", trainable=True)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all(".sum." in name for name in learning)
    before = capture(model, "sum")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = torch.ones(3, 5, dtype=torch.long)
    model(input_ids=tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    after = capture(model, "sum")
    assert after.layers == before.layers
    assert all((after.spectra[n] != before.spectra[n]).any() for n in after.spectra)


@pytest.mark.parametrize(
    ("weights", "name", "options", "match"),
    [
        ({"a": 1, "no": 1}, "sum", {}, "'no'"),
        ({}, "sum", {}, "one adapter or more"),
        ({"a": 1}, "b", {}, "already"),
        ({"a": float("nan")}, "sum", {}, "finite"),
        ({"a": 1}, "sum", {"heads": "b"}, "heads: expected one of a, or 'average'"),
    ],
)
def test_refused(
    model: nn.Module, weights: dict[str, float], name: str, options: Any, match: str
) -> None:
    names, active = adapter_names(model), active_adapters(model)
    with pytest.raises(UsageError, match=match):
        combine(model, weights, name, **options)
    assert (adapter_names(model), active_adapters(model)) == (names, active)


def test_a_fused_model_is_refused(model: nn.Module) -> None:
    fuse(model, "a")
    with pytest.raises(UsageError, match="restore"):
        combine(model, {"a": 1, "b": 1}, "sum")
