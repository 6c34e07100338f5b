"""What cannot be routed is refused, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fourierft_export import (
    FourierFTConfig,
    activate,
    attach,
    capture,
    combine,
    detach,
    export_onnx,
    fuse,
    inject,
    restore,
    route,
)
from fourierft_export.adapt.modules import adapter_names
from fourierft_export.errors import UsageError
from tests.adapt.helpers import MakeModel, adapted

NAMES = ["a", "b", None]


@pytest.fixture
def model(make_model: MakeModel) -> Any:
    """bert-cls with the adapters a, with a head, and b."""
    model = make_model("bert-cls")
    inject(model, FourierFTConfig(n_frequency=9, task_type="SEQ_CLS"), "a")
    return inject(model, FourierFTConfig(n_frequency=9, target_modules=["output.dense"]), "b")


def run(model: Any, rows: int) -> Tensor:
    return model(input_ids=torch.ones(rows, 5, dtype=torch.long)).logits


@pytest.mark.parametrize(
    ("names", "num_beams", "match"),
    [
        ("aab", 1, "for each row"),
        ([], 1, "for each row"),
        (np.array([], str), 1, "for each row"),
        (["a", "c"], 1, "'c': expected one of a, b"),
        (NAMES, 0, "num_beams"),
    ],
)
def test_names_that_say_nothing(model: Any, names: Any, num_beams: int, match: str) -> None:
    with pytest.raises(UsageError, match=match), route(model, names, num_beams=num_beams):
        pytest.fail("the block was entered")


@pytest.mark.parametrize(("found", "num_beams"), [(2, 1), (4, 1), (6, 1), (9, 2), (1, 3)])
def test_another_number_of_rows(model: Any, found: int, num_beams: int) -> None:
    with pytest.raises(UsageError) as caught, route(model, NAMES, num_beams=num_beams):
        run(model, found)
    assert caught.value.where == "module bert.encoder.layer.0.attention.self.query within route"
    assert "3 rows" in caught.value.expected
    assert caught.value.found == f"shape [{found}, 5, 32]"
    run(model, found)  # the block is over


def test_rows_and_tokens_in_one_dimension() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(-1, 6)).reshape(x.shape)

    model = inject(Flat(), FourierFTConfig(n_frequency=5, target_modules=["inner"]), "a")
    refused = pytest.raises(UsageError, match=r"inner within route.*found shape \[8, 6\]")
    with refused, route(model, ["a", None]):
        model(torch.randn(2, 4, 6))
    refused = pytest.raises(UsageError, match=r"inner within route.*found shape \[6\]")
    with refused, route(model, ["a"] * 6):
        model.inner(torch.randn(6))


@pytest.mark.parametrize("path", ["0.linear1", "0.self_attn.out_proj"])
def test_torch_layers_with_the_batch_second(path: str) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32))
    inject(model, FourierFTConfig(n_frequency=5, target_modules=[path]), "a")
    with pytest.raises(UsageError, match="batch_first") as caught, route(model, ["a", None]):
        pytest.fail("the block was entered")
    assert caught.value.offenders == (path,)


@pytest.mark.parametrize("learns", [True, False])
def test_weights_that_are_read(learns: bool) -> None:
    """nn.MultiheadAttention reads those of its output projection."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    inject(model, FourierFTConfig(n_frequency=5, target_modules=["out_proj"]), "a")
    inject(model, FourierFTConfig(n_frequency=5, target_modules=["linear1"]), "b")
    x = torch.randn(2, 3, 16)
    with torch.set_grad_enabled(learns):
        refused = pytest.raises(UsageError, match=r"0\.self_attn\.out_proj within.*are read")
        with refused, route(model, ["a", "b"]):
            model(x)
        with route(model, ["b", None]):
            model(x)


class Head(nn.Module):
    """A head with tensors of its own and of a child; `kind` says what it takes and returns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.scale, self.dense = kind, nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        if self.kind == "containers":
            x, others = x
            x = x + sum(others["more"])
        result = self.dense(x) * self.scale
        return (result, x) if self.kind == "two answers" else result


class Holder(nn.Module):
    """A layer and a head, of which the adapters a and b have their own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner, self.head = kind, nn.Linear(4, 4), Head(kind)
        for name in ("a", "b"):
            fields = {"target_modules": ["inner"], "modules_to_save": ["head"]}
            adapted(self, name, n_frequency=5, **fields)

    def forward(self, x: Tensor) -> Any:
        inner = self.inner(x)
        return self.head((inner, {"more": [x, 1.0]}) if self.kind == "containers" else inner)


@pytest.mark.parametrize("kind", ["plain", "containers"])
def test_saved_modules_are_routed_whatever_they_hold_and_take(kind: str) -> None:
    model, x = Holder(kind), torch.randn(3, 4)
    with torch.no_grad(), route(model, ["a", None, "b"]):
        found = model(x)
    for i, name in enumerate(("a", [], "b")):
        torch.testing.assert_close(found[i], activate(model, name)(x)[i])


def test_saved_modules_without_rows() -> None:
    model = Holder("two answers")
    with pytest.raises(UsageError, match=r"head within route.*tuple"), route(model, ["a", None]):
        model(torch.randn(2, 4))
    with route(model, ["a", "a"]):
        assert model(torch.randn(2, 4))[0].shape == (2, 4)
    refused = pytest.raises(UsageError, match=r"head within route.*a tensor among.*tuple")
    with refused, route(model, ["a", None]):
        model.head((1.0, {"more": [1.0]}))


def test_fused(model: Any) -> None:
    fuse(activate(model, "b"))
    with pytest.raises(UsageError, match="restore"), route(model, NAMES):
        pytest.fail("the block was entered")
    restore(model)
    with torch.no_grad(), route(model, NAMES):
        run(model, 3)


def test_nothing_changes_the_adapters_within_a_block(model: Any, tmp_path: Any) -> None:
    bundle = capture(model, "a")
    tokens = {"input_ids": torch.ones(3, 5, dtype=torch.long)}
    calls: list[Callable[[], object]] = [
        lambda: activate(model, "a"),
        lambda: fuse(model, "a"),
        lambda: detach(model, "a"),
        lambda: detach(model),
        lambda: attach(model, bundle, "c"),
        lambda: inject(model, FourierFTConfig(n_frequency=3), "c"),
        lambda: combine(model, {"a": 1, "b": 1}, "c"),
        lambda: export_onnx(model, tokens, tmp_path / "m.onnx"),
    ]
    with route(model, NAMES):
        for call in calls:
            with pytest.raises(UsageError, match="leave the block first"):
                call()
        assert capture(model, "a").to_bytes() == bundle.to_bytes()
        run(model, 3)
    assert adapter_names(model) == ("a", "b")
    assert not list(tmp_path.iterdir())
    fuse(model, "a")


def test_exporting(model: Any) -> None:
    tokens = torch.ones(3, 5, dtype=torch.long)
    with pytest.raises(UsageError, match="mode='bank'"), route(model, NAMES):
        torch.export.export(model, (tokens,), strict=False)
