"""Injected adapters against PEFT's: same spectra, outputs, gradients, heads and biases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourierft_export import FourierFTConfig, FourierLinear, inject
from fourierft_export.adapt.active import activate
from fourierft_export.adapt.modules import adapted_modules, adapter_names, fourier_layers
from fourierft_export.errors import UsageError

MakeModel = Callable[[str], nn.Module]
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


def output(model: Any, tokens: Tensor) -> Tensor:
    result = model(input_ids=tokens)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


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


def test_five_steps_of_training_are_pefts(pair: tuple[nn.Module, Any], tokens: Tensor) -> None:
    losses: list[list[float]] = []
    for model in pair:
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=0.5)
        losses.append([])
        for _ in range(5):
            out = output(model, tokens)
            goal = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
            loss = (out - goal).square().mean()
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 0.2)
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


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


def test_two_adapters_add_up_as_pefts_do(make_model: MakeModel, tokens: Tensor) -> None:
    from peft import FourierFTConfig as PeftConfig
    from peft import get_peft_model

    fields = {"n_frequency": 30, "scaling": 20.0, "target_modules": ["query", "value"]}
    other = fields | {"random_loc_seed": 5, "n_frequency": 17, "scaling": 9.0}
    torch.manual_seed(1)
    theirs = get_peft_model(make_model("bert"), PeftConfig(**fields), "a").eval()
    theirs.add_adapter("b", PeftConfig(**other))
    torch.manual_seed(1)
    ours = inject(make_model("bert"), FourierFTConfig(**fields), "a")
    inject(ours, FourierFTConfig(**other), "b")
    assert adapter_names(ours) == ("a", "b")
    base = output(make_model("bert"), tokens)
    seen = []
    for active in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        theirs.base_model.set_adapter(active)
        found = output(activate(ours, active), tokens)
        torch.testing.assert_close(found, output(theirs, tokens), rtol=1e-5, atol=2e-6)
        seen.append(found)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert (seen[2] - seen[0]).abs().max() > 1e-3
    assert torch.equal(output(activate(ours, []), tokens), base)


def test_only_the_active_adapter_learns(make_model: MakeModel) -> None:
    model = make_model("bert-cls")
    inject(model, FourierFTConfig(n_frequency=9, task_type="SEQ_CLS"), "a")
    inject(model, FourierFTConfig(n_frequency=9, bias="all"), "b")
    for name in ("a", "b"):
        activate(model, name)
        mine = {id(p) for p in own_parameters(model, name).values()}
        assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    activate(model, [])
    assert not any(p.requires_grad for p in model.parameters())


def test_each_adapter_has_its_own_head_and_biases(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("bert-cls")
    inject(model, FourierFTConfig(n_frequency=9, task_type="SEQ_CLS"), "a")
    inject(model, FourierFTConfig(n_frequency=9, task_type="SEQ_CLS", bias="all"), "b")
    before = output(activate(model, "a"), tokens)
    with torch.no_grad():
        for parameter in own_parameters(model, "b").values():
            parameter.add_(1.0)
    assert torch.equal(output(activate(model, "a"), tokens), before)
    activate(model, "b")
    reference = make_model("bert-cls")
    with torch.no_grad():
        for path, layer in fourier_layers(model).items():
            delta = layer.adapter("b").delta_weight()
            reference.get_submodule(path).weight += delta
        for name, parameter in own_parameters(model, "b").items():
            if not name.endswith("spectrum"):
                reference.get_parameter(name).copy_(parameter)
    torch.testing.assert_close(output(model, tokens), output(reference, tokens))


def test_two_heads_cannot_be_active_together(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("bert-cls")
    inject(model, FourierFTConfig(n_frequency=9, task_type="SEQ_CLS"), "a")
    inject(model, FourierFTConfig(n_frequency=9, bias="fourier_only", task_type="SEQ_CLS"), "b")
    inject(model, FourierFTConfig(n_frequency=9, target_modules=["classifier"]), "c")
    inject(model, FourierFTConfig(n_frequency=9), "d")
    before = output(activate(model, ["b", "d"]), tokens)
    with pytest.raises(UsageError) as caught:
        activate(model, ["a", "b"])
    assert caught.value.offenders == ("classifier: a and b both have their own",)
    with pytest.raises(UsageError, match="activate") as caught:
        activate(model, ["a", "c"])
    assert caught.value.offenders == ("classifier: a replaces it, c changes it",)
    assert torch.equal(output(model, tokens), before)
    activate(model, ["c", "d"])


def test_names_that_cannot_be(make_model: MakeModel) -> None:
    model = inject(make_model("bert"), FourierFTConfig(n_frequency=9))
    for name in ("", "a.b", "keys", "default", 3):
        with pytest.raises(UsageError):
            inject(model, FourierFTConfig(n_frequency=9), name)  # type: ignore[arg-type]
    for names in (["default", "default"], "defualt", ["default", "x"]):
        with pytest.raises(UsageError):
            activate(model, names)
    with pytest.raises(UsageError, match="did you mean default"):
        activate(model, "defualt")


def test_a_refused_injection_changes_nothing(make_model: MakeModel) -> None:
    model = make_model("bert")
    before = [(n, type(m), id(m)) for n, m in model.named_modules()]
    for fields in (
        {"target_modules": ["nope"]},
        {"n_frequency": 10**6},
        {"modules_to_save": ["nope"]},
        {"target_modules": ["LayerNorm"]},
    ):
        with pytest.raises(UsageError):
            inject(model, FourierFTConfig(**fields))  # type: ignore[arg-type]
    assert [(n, type(m), id(m)) for n, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_all_linear_leaves_the_tasks_head_whole(make_model: MakeModel, tokens: Tensor) -> None:
    """PEFT itself fails here: it adapts the classifier, then wants to save it whole."""
    config = FourierFTConfig(n_frequency=9, target_modules="all-linear", task_type="TOKEN_CLS")
    model = inject(make_model("bert-token"), config)
    assert "classifier" not in fourier_layers(model)
    assert list(adapted_modules(model)) == ["classifier"]
    assert output(model, tokens).shape == (3, 9, 4)


def test_text_is_generated(make_model: MakeModel, tokens: Tensor) -> None:
    model = inject(make_model("llama"), FourierFTConfig(n_frequency=30))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, **settings)
    assert found.shape == (3, 13)
    step = tokens
    for _ in range(4):  # without a cache
        step = torch.cat([step, output(model, step)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, step)


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


def test_copies_and_state_dicts(make_model: MakeModel, tokens: Tensor, tmp_path: Path) -> None:
    config = FourierFTConfig(n_frequency=9, task_type="SEQ_CLS", bias="all")
    torch.manual_seed(3)
    model = inject(make_model("bert-cls"), config)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, tokens), output(model, tokens))
    with torch.no_grad():
        for parameter in own_parameters(twin).values():
            parameter.mul_(2)
    assert not torch.equal(output(twin, tokens), output(model, tokens))
    model.load_state_dict(twin.state_dict())
    assert torch.equal(output(twin, tokens), output(model, tokens))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(output(loaded, tokens), output(model, tokens))


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


def test_construction_on_the_meta_device(make_model: MakeModel, tokens: Tensor) -> None:
    config = FourierFTConfig(n_frequency=9, task_type="SEQ_CLS")
    torch.manual_seed(3)
    real = inject(make_model("bert-cls"), config)
    with torch.device("meta"):
        model = type(real)(real.config).eval()
    inject(model, config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for name, buffer in make_model("bert-cls").named_buffers():
        model.get_buffer(name).copy_(buffer)
    model.load_state_dict(real.state_dict())
    assert torch.equal(output(model, tokens), output(real, tokens))
