"""What cannot be routed is refused, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from fourierft_export.adapt.modules import adapted_modules, adapter_names
from fourierft_export.errors import UsageError
from tests.adapt.helpers import MakeModel

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


def test_versions_that_answer_with_more_than_one_tensor() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.bias, x

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(self.inner(x))[0]

    config = FourierFTConfig(n_frequency=5, target_modules=["inner"], modules_to_save=["pair"])
    model = inject(Two(), config, "a")
    with pytest.raises(UsageError, match=r"pair within route.*tuple"), route(model, ["a", None]):
        model(torch.randn(2, 4))
    with route(model, ["a", "a"]):
        assert model(torch.randn(2, 4)).shape == (2, 4)


class Scaled(nn.Module):
    """A module with a tensor of its own that takes its input within a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, given: Any) -> Tensor:
        x, others = given
        return (x + sum(others["more"])) * self.scale


def test_tensors_within_containers_are_routed_and_none_are_refused() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.scaled = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.scaled((self.inner(x), {"more": [x, 1.0]}))

    config = FourierFTConfig(n_frequency=5, target_modules=["inner"], modules_to_save=["scaled"])
    model = inject(Holder(), config, "a")
    x = torch.randn(3, 4)
    with torch.no_grad():
        adapted_modules(model)["scaled"].version("a").module.scale.mul_(3)
        with route(model, ["a", None, "a"]):
            found = model(x)
        for i, name in enumerate(("a", [], "a")):
            torch.testing.assert_close(found[i], activate(model, name)(x[i]))
        refused = pytest.raises(UsageError, match=r"scaled within route.*a tensor among.*tuple")
        with refused, route(model, ["a", None, "a"]):
            model.scaled((1.0, {"more": [1.0]}))


def test_saved_modules_within_saved_modules() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.dense = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.dense(x) * self.scale

    model = nn.Sequential(nn.Linear(4, 4), Head())
    for name in ("a", "b"):
        config = FourierFTConfig(n_frequency=5, target_modules=["0"], modules_to_save=["1"])
        inject(model, config, name)
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, Head)).scale.mul_(2)
    x = torch.randn(2, 4)
    with torch.no_grad(), route(model, ["a", "b"]):
        found = model(x)
    for i, name in enumerate("ab"):
        torch.testing.assert_close(found[i], activate(model, name)(x)[i])


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
