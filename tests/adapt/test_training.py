"""What training needs from the layer: compile, checkpointing, DDP, memory for the backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fourierft_export import FourierFTConfig, FourierLinear, fuse, inject
from fourierft_export.adapt.active import activate
from fourierft_export.bundle.spec import AdapterSpec
from fourierft_export.spectral import cost
from tests.adapt.helpers import MakeModel, adapted, output


@pytest.fixture(params=cost.FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to apply an adapter, each forced in its turn."""
    with cost.force(form=request.param):
        yield request.param


def gradients(model: nn.Module, result: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    goal = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    (result.float() * goal).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        bound = 2e-5 * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=bound)


def test_compiled_whole(make_model: MakeModel, tokens: Tensor, form: str) -> None:
    torch._dynamo.reset()
    config = FourierFTConfig(n_frequency=25, task_type="SEQ_CLS", bias="fourier_only")
    whole: Any = make_model("bert-cls")
    whole.bert.encoder.layer = whole.bert.encoder.layer[:1]  # compiled sooner
    model = inject(whole, config)
    second = FourierFTConfig(n_frequency=9, target_modules=["key"], random_loc_seed=1)
    activate(inject(model, second, "second"), ["default", "second"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = output(model, tokens)
    found = output(compiled, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert_same(gradients(model, found), gradients(model, output(model, tokens)))
    with torch.no_grad():
        torch.testing.assert_close(output(compiled, tokens), expected, rtol=1e-5, atol=2e-6)
        fuse(model)
        torch.testing.assert_close(output(compiled, tokens), expected, rtol=1e-5, atol=2e-6)


def test_compiled_follows_the_active_adapter(make_model: MakeModel) -> None:
    torch._dynamo.reset()
    model, x = adapted(make_model("sequential"), target_modules=["0"]), torch.randn(4, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    changed = compiled(x)
    torch.testing.assert_close(changed, model(x))
    activate(model, [])
    torch.testing.assert_close(compiled(x), make_model("sequential")(x))
    activate(model, "default")
    with torch.no_grad():
        model[0].adapter("default").spectrum.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))
    assert (compiled(x) - changed).abs().max() > 1e-3


def test_compiled_for_any_number_of_rows() -> None:
    torch._dynamo.reset()
    layer = trained_layer(48, 64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    forms = set()
    for rows in (3, 7, 900, 5000, 2):
        x = torch.randn(rows, 64)
        forms.add(cost.choose_form(rows, (48, 64), 200, training=True))
        found = compiled(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
        assert_same(gradients(layer, found), gradients(layer, layer(x)))
    assert forms == {"token", "dense"}, "the rows must lie on both sides of the choice"


def test_training_after_inference_mode(form: str) -> None:
    """Tables made without autograd are shared with the training steps that follow."""
    layer = trained_layer(96, 64)
    x = torch.randn(50, 64, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x)
    found = layer(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert x.grad is not None
    assert layer.adapter("a").spectrum.grad is not None


def test_exported_for_any_batch(make_model: MakeModel, tokens: Tensor) -> None:
    model = inject(make_model("sequential"), FourierFTConfig(n_frequency=9, target_modules=["0"]))
    rows = torch.export.Dim("rows", min=1, max=10_000)
    program = torch.export.export(model, (torch.randn(4, 12),), dynamic_shapes=({0: rows},))
    x = torch.randn(700, 12)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(
    make_model: MakeModel, tokens: Tensor, form: str, reentrant: bool
) -> None:
    config = FourierFTConfig(n_frequency=25, task_type="SEQ_CLS")
    model = inject(make_model("bert-cls"), config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model, output(model, tokens))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(gradients(model, output(model, tokens)), expected)


def held_bytes(module: nn.Module, function: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, besides the module's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # kept alive, so that no storage is counted twice under one address
    assert result.requires_grad
    return sum(kept.values())


def trained_layer(rows: int, columns: int, n: int = 200) -> FourierLinear:
    torch.manual_seed(0)
    layer = FourierLinear(nn.Linear(columns, rows).requires_grad_(False))
    layer.add_adapter("a", torch.randn(n), AdapterSpec(1, 20.0, ()))
    layer.active = ("a",)
    layer.adapter("a").spectrum.requires_grad_()
    return layer


@pytest.mark.parametrize("wants_x", [False, True])
def test_memory_held_for_backward(form: str, wants_x: bool) -> None:
    layer = trained_layer(96, 64)
    x = torch.randn(50, 64, requires_grad=wants_x)
    weight = 96 * 64 * 4 if form == "dense" and wants_x else 0
    assert held_bytes(layer, lambda: layer(x)) == 50 * 64 * 4 + weight


def test_fifty_steps_follow_pefts(stories260k: Path, stories_tokens: np.ndarray) -> None:
    """A trained model, real text, AdamW, the same start: the same curve and the same spectra."""
    from peft import FourierFTConfig as PeftConfig
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    fields = {"n_frequency": 200, "scaling": 60.0, "target_modules": ["q_proj", "v_proj"]}
    tokens = torch.from_numpy(stories_tokens).flip(1)  # text read backwards is something to learn
    losses, spectra = [], []
    for adapt, make_config in ((inject, FourierFTConfig), (get_peft_model, PeftConfig)):
        base = LlamaForCausalLM.from_pretrained(stories260k)
        torch.manual_seed(1)
        model: Any = adapt(base, make_config(**fields, init_weights=True))
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-2)
        curve = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
        spectra.append(torch.cat([p.detach() for p in learning]))
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (spectra[0] - spectra[1]).norm() <= 1e-4 * spectra[1].norm()


def test_distributed_data_parallel_in_one_process(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path, form: str
) -> None:
    from torch import distributed

    model = inject(make_model("bert-cls"), FourierFTConfig(n_frequency=25, task_type="SEQ_CLS"))
    # An idle adapter must not make DDP wait for its gradients.
    inject(model, FourierFTConfig(n_frequency=9, target_modules=["key"]), "idle")
    activate(model, "default")
    expected = gradients(model, output(model, tokens))
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            found = gradients(model, output(parallel, tokens))
            assert_same(found, expected)
        del parallel  # before its group: the other way round torch can wait for itself
        gc.collect()
    finally:
        distributed.destroy_process_group()
