"""Training on a mixed batch: gradients are those of the rows run one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fourierft_export import activate, attach, capture, route
from fourierft_export.spectral import cost
from tests.adapt.helpers import MakeModel, adapted

NAMES = ["a", "b", "c", None, "a", "d"]


def trainee(make_model: MakeModel, *, zero_dropout: bool = True) -> Any:
    """bert-cls in float64 with a head and biases for a, c and d, and d not to be trained."""
    model = make_model("bert-cls")
    for name, seed, fields in (
        ("a", 5, {"task_type": "SEQ_CLS", "bias": "all"}),
        ("b", 5, {"n_frequency": 21, "scaling": 9.0}),
        ("c", 6, {"task_type": "SEQ_CLS"}),
    ):
        adapted(model, name, random_loc_seed=seed, **fields)
    attach(model, capture(model, "c"), "d")
    for module in model.modules():
        if isinstance(module, nn.Dropout) and zero_dropout:
            module.p = 0.0
    return model.double().train()


def tokens() -> Tensor:
    return torch.randint(1, 60, (len(NAMES), 7), generator=torch.Generator().manual_seed(6))


def loss_of(model: Any, rows: slice = slice(None)) -> Tensor:
    """A sum over rows, so that it splits."""
    logits = model(input_ids=tokens()[rows]).logits
    targets = torch.arange(len(NAMES))[rows] % 3
    loss: Tensor = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of all that has one; they are taken away from the model."""
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def one_by_one(model: nn.Module) -> dict[str, Tensor]:
    for i, name in enumerate(NAMES):
        activate(model, [] if name is None else name)
        loss = loss_of(model, slice(i, i + 1))
        if loss.requires_grad:
            loss.backward()
    return gradients(model)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("form", [None, *cost.FORMS])
def test_gradients_are_the_sum_of_separate_runs(
    make_model: MakeModel, form: str | None, inside: bool
) -> None:
    model = trainee(make_model)
    with cost.force(form=form):
        wanted = one_by_one(model)
        activate(model, "b")
        with route(model, NAMES):
            loss = loss_of(model)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    found = gradients(model)
    assert_same(found, wanted)
    assert {name.split(".")[-2] for name in found if "spectrum" in name} == {"a", "b", "c"}
    assert any("versions.a" in name for name in found)


def test_only_the_active_learn_again_after_the_next_activate(make_model: MakeModel) -> None:
    model = trainee(make_model)
    activate(model, "b")
    before = [n for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad(), route(model, NAMES):
        loss_of(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == before
    with route(model, NAMES):
        learning = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
        assert {"a", "b", "c"} <= learning
        assert "d" not in learning
    activate(model, "b")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == before


def test_training_after_inference_mode_in_one_block(make_model: MakeModel) -> None:
    model = trainee(make_model)
    wanted = one_by_one(model)
    with route(model, NAMES):
        with torch.inference_mode():
            loss_of(model)
        loss_of(model).backward()
    assert_same(gradients(model), wanted)


def checkpointing(model: Any, reentrant: bool) -> None:
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    if reentrant:
        model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_run_again_with_the_same_rows(
    make_model: MakeModel, reentrant: bool
) -> None:
    """The second run is in the backward pass, when the block is over."""
    model = trainee(make_model)
    wanted = one_by_one(model)
    activate(model, "b")
    checkpointing(model, reentrant)
    with route(model, NAMES):
        loss = loss_of(model)
    loss.backward()
    assert_same(gradients(model), wanted)
    activate(model, "a")
    loss_of(model).backward()  # and the next pass without a block has none
    found = gradients(model)
    assert {name.split(".")[-2] for name in found if "spectrum" in name} == {"a"}


@pytest.mark.parametrize("other", [NAMES[::-1], None])
def test_a_second_run_under_other_rows_is_an_error(
    make_model: MakeModel, other: list[str | None] | None
) -> None:
    model = trainee(make_model)
    checkpointing(model, reentrant=False)
    with route(model, NAMES):
        loss = loss_of(model)
    if other is None:
        loss_of(activate(model, "a"))
    else:
        with route(model, other):
            loss_of(model)
    with pytest.raises(CheckpointError):
        loss.backward()
