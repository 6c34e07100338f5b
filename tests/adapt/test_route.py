"""One batch, an adapter for each row: the same as running every row by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourierft_export import FourierLinear, activate, route
from fourierft_export.adapt.modules import active_adapters
from fourierft_export.bundle.spec import AdapterSpec
from fourierft_export.spectral import cost
from tests.adapt.helpers import MakeModel, adapted

# name -> its own fields: one seed for three of them, n 9 and other scalings among them, biases
# and heads, layers that not all of them touch.
ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"task_type": "SEQ_CLS", "bias": "all"},
    "plain": {},
    "scaled": {"scaling": 70.0},
    "few": {"n_frequency": 9},
    "seed": {"random_loc_seed": 8},
    "wide": {"random_loc_seed": 9, "target_modules": "all-linear", "bias": "fourier_only"},
}
NAMES = ["few", None, "head", "plain", "wide", "scaled", "head", "seed", "plain"]


def with_all(model: nn.Module, kind: str = "bert-cls") -> nn.Module:
    for name, fields in ADAPTERS.items():
        fields = {k: v for k, v in fields.items() if kind.endswith("-cls") or k != "task_type"}
        adapted(model, name, **fields)
    return model


def rows(count: int, length: int = 7) -> Tensor:
    return torch.randint(1, 60, (count, length), generator=torch.Generator().manual_seed(6))


def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits


def alone(model: nn.Module, names: Sequence[str | None], tokens: Tensor) -> Tensor:
    """Every row by itself, under its own adapter."""
    each = []
    for i, name in enumerate(names):
        activate(model, [] if name is None else name)
        each.append(logits(model, tokens[i : i + 1]))
    return torch.cat(each)


@pytest.mark.parametrize("form", [None, *cost.FORMS])
@pytest.mark.parametrize("kind", ["bert-cls", "llama-cls", "gpt2", "llama-tied"])
@torch.no_grad()
def test_each_row_is_as_if_alone(make_model: MakeModel, kind: str, form: str | None) -> None:
    """In float64, where rounding cannot hide a wrong row."""
    model = with_all(make_model(kind), kind).double()
    tokens = rows(len(NAMES))
    with cost.force(form=form):
        wanted = alone(model, NAMES, tokens)
        with route(model, NAMES) as same:
            found = logits(model, tokens)
    assert same is model
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    base = logits(activate(model, []), tokens)
    changed = (found - base).abs().flatten(1).amax(1) > 1e-6
    assert changed.tolist() == [name is not None for name in NAMES]


def layer_with(dtype: torch.dtype, spectra: torch.dtype) -> FourierLinear:
    torch.manual_seed(0)
    layer = FourierLinear(nn.Linear(96, 64).to(dtype))
    for name, n, seed, scaling in (
        ("a", 50, 7, 60.0),
        ("b", 50, 7, 60.0),
        ("c", 50, 7, -11.0),
        ("d", 30, 7, 60.0),
        ("e", 50, 1, 25.0),
    ):
        # Of one seed, but not of one dtype.
        own = torch.float64 if name == "b" else spectra
        layer.add_adapter(name, torch.randn(n).to(own), AdapterSpec(seed, scaling, ()))
    return layer


@pytest.mark.parametrize("form", [None, *cost.FORMS])
@pytest.mark.parametrize("leading", [(), (3,), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_layer_in_every_dtype(
    dtype: torch.dtype, leading: tuple[int, ...], form: str | None
) -> None:
    layer = layer_with(dtype, torch.float32 if dtype == torch.float32 else torch.bfloat16)
    model = nn.Sequential(layer)
    names = ["a", "b", None, "d", "c", "a", "e"]
    x = torch.randn(len(names), *leading, 96).to(dtype)
    with cost.force(form=form), route(model, names):
        found = model(x)
    assert found.dtype == dtype
    for i, name in enumerate(names):
        layer.active = () if name is None else (name,)
        with cost.force(form=form):
            wanted = layer(x[i : i + 1])[0]
        error = (found[i].double() - wanted.double()).norm() / wanted.double().norm()
        assert error <= {torch.bfloat16: 4e-3}.get(dtype, 1e-6), name


@torch.no_grad()
def test_blocks_nest_and_leave_everything_as_it_was(make_model: MakeModel) -> None:
    model = with_all(make_model("bert-cls"))
    tokens = rows(2)
    wanted = [logits(activate(model, name), tokens) for name in ("plain", "seed", "head")]
    activate(model, ["head", "plain"])
    both = logits(model, tokens)
    with route(model, ["plain"] * 2):
        with route(model, ["seed"] * 2):
            torch.testing.assert_close(logits(model, tokens), wanted[1])
        torch.testing.assert_close(logits(model, tokens), wanted[0])
        with pytest.raises(RuntimeError, match="mine"), route(model, ["head"] * 2):
            torch.testing.assert_close(logits(model, tokens), wanted[2])
            raise RuntimeError("mine")
        torch.testing.assert_close(logits(model, tokens), wanted[0])
    assert set(active_adapters(model)) == {"head", "plain"}
    assert torch.equal(logits(model, tokens), both)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "t5"])
@torch.no_grad()
def test_generation(make_model: MakeModel, kind: str, num_beams: int) -> None:
    """Encoders see the rows as they are, decoders each row num_beams times."""
    model: Any = make_model(kind)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.decoder_start_token_id = None, 0, 0
    adapted(model, "a", scaling=3000.0, target_modules="all-linear")
    adapted(model, "b", scaling=3000.0, bias="all")
    adapted(model, "c", scaling=3000.0, random_loc_seed=6, n_frequency=9)
    names = ["c", "a", None, "b"]
    tokens = rows(len(names))
    options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False}
    with route(model, names, num_beams=num_beams):
        found = model.generate(input_ids=tokens, **options)
    for i, name in enumerate(names):
        activate(model, [] if name is None else name)
        assert torch.equal(model.generate(input_ids=tokens[i : i + 1], **options)[0], found[i])
    assert not torch.equal(model.generate(input_ids=tokens, **options), found)


@torch.no_grad()
def test_torch_layers_that_know_a_fast_path() -> None:
    """Without gradients nn.TransformerEncoderLayer reads weights rather than calling layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    adapted(model, "a", target_modules=["linear1", "linear2"])
    adapted(model, "b", target_modules=["linear1"], bias="fourier_only")
    names = ["a", "b", None, "a"]
    x = torch.randn(4, 5, 16)
    with route(model, names):
        found = model(x)
    for i, name in enumerate(names):
        activate(model, [] if name is None else name)
        torch.testing.assert_close(found[i], model(x[i : i + 1])[0])


@torch.no_grad()
def test_a_compiled_model_is_routed_too(make_model: MakeModel) -> None:
    torch.compiler.reset()
    model = make_model("sequential")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        bias = "fourier_only" if name == "b" else "none"
        adapted(model, name, target_modules="all-linear", random_loc_seed=seed, bias=bias)
    activate(model, "a")
    x = torch.randn(4, 12)
    plain = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain)
    for names in (["a", "b", "c", None], ["b", "b", None, "c"]):
        with route(model, names):
            wanted = model(x)
            torch.testing.assert_close(compiled(x), wanted)
        assert not torch.allclose(wanted, plain)
    torch.testing.assert_close(compiled(x), plain)
    torch.compiler.reset()


@torch.no_grad()
def test_a_routed_model_can_be_copied(make_model: MakeModel) -> None:
    model = with_all(make_model("bert-cls"))
    tokens = rows(3)
    activate(model, "wide")
    wanted = logits(model, tokens)
    with route(model, ["head", "seed", None]):
        found = logits(model, tokens)
        twin = copy.deepcopy(model)
        # The copy is in no block, since none would end there.
        assert torch.equal(logits(twin, tokens), wanted)
        with route(twin, ["head", "seed", None]):
            assert torch.equal(logits(twin, tokens), found)
        assert torch.equal(logits(model, tokens), found)
    assert model.state_dict().keys() == copy.deepcopy(model).state_dict().keys()
