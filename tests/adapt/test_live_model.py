"""A live model behaves as PEFT's does, or as fourierft_export/adapt/PEFT.md says."""

from __future__ import annotations

import copy
import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fourierft_export as ff
from fourierft_export.errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from fourierft_export.spectral import cost
from tests.adapt.helpers import move


class Head(nn.Module):
    """A module with a tensor of its own, another method than forward, and names of the wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))
        self.inner = nn.Linear(8, 8)
        self.active, self.version, self.original = False, 3, "mine"
        self.bound, self.listed = self.score, [self.w]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.w

    def score(self, x: Tensor) -> Tensor:
        return x * self.listed[0]


class Net(nn.Module):
    """A linear layer `q` and a head, used by its method `via`."""

    def __init__(self, q: nn.Module | None = None, via: str = "forward") -> None:
        super().__init__()
        self.q, self.head, self.via = q or nn.Linear(8, 8), Head(), via

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.head, self.via)(self.q(x))


def config(**fields: Any) -> ff.FourierFTConfig:
    given = {"n_frequency": 9, "scaling": 20.0, "target_modules": ["q"], **fields}
    return ff.FourierFTConfig(**given)


def net(*names: str, q: nn.Module | None = None, via: str = "forward", **fields: Any) -> Net:
    """A seeded net with an adapter of other numbers for each name."""
    torch.manual_seed(0)
    model = Net(q, via)
    for name in names:
        ff.inject(model, config(**fields), name)
        move(model, 1.0)
    return model


def spectra(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith("spectrum")}


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


# Routing


def test_a_routed_block_is_its_threads_own() -> None:
    """Plain passes and other blocks in other threads, meanwhile, give their own answers."""
    model = net("a", "b", modules_to_save=["head"])
    ff.activate(model, [])
    wanted: dict[str | None, Tensor] = {}
    with torch.no_grad():
        for name in ("a", "b", None):
            wanted[name] = ff.activate(model, [] if name is None else name)(X)
        wrong: list[float] = []
        stop = threading.Event()

        def serve(name: str | None) -> None:
            with torch.no_grad():
                while not stop.is_set():
                    if name is None:
                        answer = model(X)
                    else:
                        with ff.route(model, [name, name]):
                            answer = model(X)
                    wrong.append((answer - wanted[name]).abs().max().item())

        threads = [threading.Thread(target=serve, args=(name,)) for name in ("a", "b", None)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            with ff.route(model, ["a", "b"]):
                answer = model(X)
            torch.testing.assert_close(answer[0], wanted["a"][0])
            torch.testing.assert_close(answer[1], wanted["b"][1])
        stop.set()
        for thread in threads:
            thread.join()
    assert len(wrong) > 10
    assert max(wrong) < 1e-5


@pytest.mark.parametrize("via", ["forward", "score", "bound", "inner"])
def test_routed_methods_and_children_of_a_saved_module(via: str) -> None:
    model = net("a", "b", via=via, modules_to_save=["head"])
    with torch.no_grad(), ff.route(model, ["b", "a"]):
        found = model(X)
    for row, name in zip(found, ("b", "a"), strict=True):
        i = ("b", "a").index(name)
        torch.testing.assert_close(row, ff.activate(model, name)(X)[i])


def test_data_parallel_is_not_routed_in_silence() -> None:
    model = net("a")
    replica = model.q._replicate_for_data_parallel()
    with ff.route(model, ["a", "a"]), pytest.raises(UsageError, match="DataParallel"):
        replica(X)


# The base layer's own forward and hooks


class Scaled(nn.Linear):
    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        return super().forward(x) * 3 / temperature


def own_forward() -> nn.Module:
    layer = nn.Linear(8, 8)
    before = layer.forward
    layer.forward = lambda x: before(x) * 3  # type: ignore[method-assign]
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda _layer, _args, output: output * 3)
    return layer


@pytest.mark.parametrize("make", [lambda: Scaled(8, 8), own_forward, hooked])
@pytest.mark.parametrize("form", ["token", "dense"])
def test_the_base_layer_keeps_its_forward_and_hooks(make: Any, form: str) -> None:
    """As in PEFT, they run on W alone, without delta_W; on W + delta_W if fused."""
    model = net("a", q=make())
    change = (X @ model.q.adapter("a").delta_weight().T).detach()
    base = model.q.base_layer(X).detach()
    with cost.force(form=form), torch.no_grad():
        torch.testing.assert_close(model.q(X), base + change)
        ff.fuse(model)
        torch.testing.assert_close(model.q(X), base + 3 * change)
        ff.restore(model)
        torch.testing.assert_close(model.q(X), base + change)


def test_backward_hooks_run_in_both_forms_and_arguments_are_passed_on() -> None:
    model = net("a")
    calls: list[int] = []
    model.q.base_layer.register_full_backward_hook(lambda *_: calls.append(1))
    for i, form in enumerate(cost.FORMS, 1):
        with cost.force(form=form):
            model(X.clone().requires_grad_()).sum().backward()
        assert len(calls) == i
    scaled = net("a", q=Scaled(8, 8))
    change = scaled.q(X) - scaled.q.base_layer(X)
    found = scaled.q(X, temperature=2.0)
    torch.testing.assert_close(found, scaled.q.base_layer(X) / 2 + change)


# Saved modules


def test_saved_modules_with_modules_in_them_open_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.head = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(*[self.q(x)] * 3)[0]

    model = ff.inject(Attending(), config(modules_to_save=["head"]))
    base = ff.detach(copy.deepcopy(model))
    move(model)
    bundle = ff.capture(model)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), ff.to_peft(bundle, tmp_path / "peft"))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=2e-6)
    # Attaching what was captured wraps the head as one module again, and so does a PEFT directory.
    for source in (bundle, str(tmp_path / "peft")):
        again = ff.attach(copy.deepcopy(base), source)
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=2e-6)
        assert spectra(again) == spectra(model)
        assert again.state_dict().keys() == model.state_dict().keys()


def test_parametrized_modules(tmp_path: Path) -> None:
    """weight_norm next to an adapted layer, under bias="all", and in the adapted layer itself."""
    import onnxruntime

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"q": nn.Linear(8, 8), "conv": parametrizations.weight_norm(nn.Conv1d(8, 8, 3))}
    )
    x = torch.randn(1, 8, 5)
    plain = model["conv"](x)
    ff.inject(model, config(bias="all"))
    assert torch.equal(model["conv"](x), plain)
    model["conv"](x).sum().backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(names) == 1
    assert names.pop().endswith("bias")
    model = net("a", q=parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(UsageError, match="remove_parametrizations"):
        ff.fuse(model)
    path = tmp_path / "m.onnx"
    ff.export_onnx(model, (X,), path)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(found, model(X).detach().numpy(), atol=1e-4)


def test_cached_methods_and_parameters_of_a_saved_module_learn() -> None:
    model = net("a", via="bound", modules_to_save=["head"])
    model(X).sum().backward()
    (own,) = [p for n, p in model.named_parameters() if n.endswith("versions.a.module.w")]
    assert own.grad is not None
    assert own.grad.abs().sum() > 0


def test_versions_go_on_sharing_the_bases_tensors() -> None:
    """Off the meta device, through load_state_dict(assign=True), and while fused."""
    with torch.device("meta"):
        model = Net()
    ff.inject(model, config(bias="fourier_only"))
    count = sum(p.numel() for p in model.parameters())
    assert model(torch.empty(2, 8, device="meta")).shape == (2, 8)
    model.to_empty(device="cpu")
    assert sum(p.numel() for p in model.parameters()) == count
    source = net(bias="fourier_only")
    ff.inject(source, config(bias="fourier_only"))
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(X), source(X))
    weight = model.q.base_layer.original.weight
    assert model.q.base_layer.version("default").module.weight is weight


def test_state_dicts_grow_by_what_adapters_have() -> None:
    class Nested(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(8))
            self.inner = Nested(depth - 1) if depth else nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + self.bias)

    for fields, own in (({"modules_to_save": ["head"]}, 8), ({"bias": "all"}, 8)):
        model = net()
        model.head = Nested(5)  # type: ignore[assignment]
        before = len(model.state_dict())
        for i, name in enumerate("ab", 1):
            ff.inject(model, config(**fields), name)
            assert len(model.state_dict()) == before + i * (own + 1)


def test_a_saved_module_keeps_the_names_that_the_wrapper_uses() -> None:
    model = net("a", modules_to_save=["head"])
    assert (model.head.active, model.head.version, model.head.original) == (False, 3, "mine")


class Twice(Net):
    """Uses its head at two places."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.again(super().forward(x))


def test_a_saved_module_at_two_places_stays_one() -> None:
    model = Twice()
    head = model.head
    ff.inject(model, config(modules_to_save=["head"]))
    move(model)
    wanted = model(X)
    for merge in (False, True):
        plain = ff.unload(copy.deepcopy(model), merge=merge)
        assert plain.again is plain.head
        assert isinstance(plain.head, Head)
    torch.testing.assert_close(plain(X), wanted)
    assert ff.detach(model).head is head is model.again


def test_a_saved_module_at_two_places_is_exported(tmp_path: Path) -> None:
    """Its base, too: a file without an adapter fed answers as the base does."""
    model = Twice().eval()
    base = model(X).detach()
    ff.inject(model, config(modules_to_save=["head"]))
    move(model, 0.5)
    ff.export_onnx(model, (X,), tmp_path / "m.onnx", mode="swappable")
    session = ff.AdapterSession(tmp_path / "m.onnx")
    session.load("mine", ff.capture(model))
    for adapter, wanted in ((None, base), ("mine", model(X).detach())):
        (found,) = session.run({"x": X.numpy()}, adapter=adapter).values()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert model.again is model.head


def test_attributes_set_on_a_saved_module_reach_all_its_versions() -> None:
    """PEFT's wrapper keeps them for itself, where the module never sees them."""
    model = net("a", "b", modules_to_save=["head"])
    model.head.version = 7
    for names in ("a", "b", []):
        assert ff.activate(model, names).head.version == 7
    model.head.new = "one"
    assert ff.detach(model).head.new == "one"
    ff.inject(model, config(modules_to_save=["head"]))
    with pytest.raises(UsageError, match="in place"):
        model.head.inner = nn.Linear(8, 8)
    model.eval()
    assert not model.head.inner.training


def test_detaching_from_the_whole_frees_a_part(tmp_path: Path) -> None:
    """The adapter was put on a part of the model, which froze that part."""
    model = nn.Sequential(net("a"), nn.Linear(8, 8))
    ff.detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# What is refused leaves the model as it was


def state_of(model: nn.Module) -> list[tuple[str, type, bool]]:
    return [
        (path, type(m), any(p.requires_grad for p in m.parameters()))
        for path, m in model.named_modules()
    ]


def test_refusals_change_nothing(tmp_path: Path) -> None:
    model = net()
    before = state_of(model)
    with pytest.raises(UsageError, match="choose another name"):
        ff.inject(model, config(), "training")
    bundle = ff.capture(net("a", target_modules=["q", "inner"]), "a")
    wrong = dataclasses.replace(bundle.layers[1], entries_sha256="0" * 64)
    spec = dataclasses.replace(bundle.spec, layers=(bundle.layers[0], wrong))
    faulty = ff.Bundle.from_bytes(ff.Bundle.build(spec, bundle.spectra).to_bytes())
    with pytest.raises(BadInputError):
        ff.attach(model, faulty, trainable=True)
    with pytest.raises(FileAccessError):
        ff.attach(model, tmp_path / "none.fourierft.safetensors")
    with pytest.raises(UsageError, match="expected a bundle, or the path"):
        ff.attach(model, 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rank"):
        ff.inject(model, {"rank": 8})
    fields: list[dict[str, Any]] = [{"target_modules": ["nope"]}, {"n_frequency": 10**6}]
    for given in (*fields, {"modules_to_save": ["nope"]}, {"target_modules": ["head"]}):
        with pytest.raises(UsageError):
            ff.inject(model, config(**given))
    assert state_of(model) == before


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    bundle = ff.capture(net("a"), "a")
    model = cpu_offload(net(), execution_device="cpu")
    for put in (lambda: ff.inject(model, config()), lambda: ff.attach(model, bundle)):
        with pytest.raises(UsageError, match="accelerate offloads"):
            put()


# Selection and configuration, as in PEFT


def test_a_full_path_needs_no_block_number() -> None:
    from peft import FourierFTConfig, get_peft_model

    torch.manual_seed(0)
    layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(2)])
    model = nn.ModuleDict({"lm_head": nn.Linear(8, 8), "m": nn.ModuleDict({"layers": layers})})
    fields = {"n_frequency": 9, "target_modules": ["lm_head", "q"], "layers_to_transform": [0]}
    theirs = get_peft_model(copy.deepcopy(model), FourierFTConfig(**fields))
    adapted = {
        n.split("model.", 2)[2].split(".fourierft")[0]
        for n, _ in theirs.named_parameters()
        if "spectrum" in n
    }
    ff.inject(model, ff.FourierFTConfig(**fields))
    assert {name.split(".adapters")[0] for name in spectra(model)} == adapted


def test_configurations_of_every_kind(tmp_path: Path) -> None:
    from peft import FourierFTConfig, TaskType

    fields: dict[str, Any] = {"n_frequency": 9, "target_modules": ["q"], "task_type": "SEQ_CLS"}
    theirs = FourierFTConfig(**{**fields, "task_type": TaskType.SEQ_CLS})
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    for source in (fields, theirs, theirs.to_dict(), tmp_path, str(file)):
        model = ff.inject(Net(), source)
        assert spectra(model) == {"q.adapters.default.spectrum"}
        assert ff.capture(model).spec.task_type == "SEQ_CLS"
    assert ff.FourierFTConfig(task_type=TaskType.SEQ_CLS).task_type == "SEQ_CLS"
    with pytest.raises(UsageError, match="task_type: expected one of"):
        ff.FourierFTConfig(task_type="POETRY")


# Wrappers around the model, and torch's transforms


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile]
)
def test_wrapped_models_are_captured_under_the_bases_names(wrap: Any) -> None:
    model = net("default")
    bundle = ff.capture(wrap(model))
    assert [layer.name for layer in bundle.layers] == ["q"]
    assert bundle.to_bytes() == ff.capture(model).to_bytes()


@pytest.mark.parametrize("form", cost.FORMS)
def test_functional_calls_and_second_derivatives(form: str) -> None:
    model = net("a")
    parameters = {n: p.detach() for n, p in model.named_parameters() if n.endswith("spectrum")}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    with cost.force(form=form):
        (spectrum,) = (p for n, p in model.named_parameters() if n in parameters)
        (wanted,) = torch.autograd.grad(model(X).square().sum(), spectrum)
        (found,) = torch.func.grad(loss)(parameters, X).values()
        torch.testing.assert_close(found, wanted)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X[:, None])
        torch.testing.assert_close(next(iter(each.values())).sum(0), wanted)
        with torch.no_grad():  # where no autograd function is in between
            torch.testing.assert_close(torch.func.vmap(model)(X), model(X))
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        jacobian = torch.autograd.functional.jacobian(model, X).reshape(16, 16)
    # The model is affine: the gradient is 2 J^T y, and that of its square 8 J^T J J^T y.
    wanted = 8 * jacobian.T @ jacobian @ jacobian.T @ model(X).reshape(-1)
    torch.testing.assert_close(second.reshape(-1), wanted, rtol=1e-4, atol=1e-2)


# Conveniences


def test_names_and_counts() -> None:
    model = net("a", "b", modules_to_save=["head"])
    assert ff.adapter_names(model) == ("a", "b")
    assert ff.active_adapters(model) == ("b",)
    found = ff.trainable_parameters(model)
    assert found.count == 9 + 8 + 72
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.share == found.count / found.total
    assert ff.trainable_parameters(ff.fuse(model)).count == 0


def test_attach_freezes_the_base_and_detach_frees_it(caplog: pytest.LogCaptureFixture) -> None:
    bundle = ff.capture(net("a"), "a")
    model = net()
    ff.attach(ff.attach(model, bundle, "one"), bundle, "two")
    assert ff.trainable_parameters(model).count == 0
    ff.detach(model, "two")
    assert "no adapter is active now; one can be activated" in caplog.text
    assert ff.active_adapters(model) == ()
    ff.detach(model, "one")
    found = ff.trainable_parameters(model)
    assert found.count == found.total


def test_while_fused_state_is_the_bases() -> None:
    model = net("a", bias="fourier_only", modules_to_save=["head"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ff.fuse(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(UsageError, match="restore"):
        model.load_state_dict(before)
    fingerprints = [layer.fingerprint for layer in ff.capture(model, "a").layers]
    ff.restore(model)
    assert fingerprints == [layer.fingerprint for layer in ff.capture(model, "a").layers]
    model.load_state_dict(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fields", [{"modules_to_save": ["head"]}, {"bias": "fourier_only"}])
def test_unload(dtype: torch.dtype, fused: bool, fields: dict[str, Any]) -> None:
    model = net("a", **fields)
    names = [name for name, _ in ff.detach(copy.deepcopy(model)).named_parameters()]
    weights = [p.detach().clone() for p in ff.unload(copy.deepcopy(model)).parameters()]
    for weight, was in zip(weights, Net().parameters(), strict=True):
        assert weight.shape == was.shape
    model.to(dtype)
    expected = ff.fuse(copy.deepcopy(model))(X.to(dtype))
    layer = model.q.base_layer
    merged = ff.unload(ff.fuse(model) if fused else model, merge=True)
    assert torch.equal(merged(X.to(dtype)), expected)
    assert [name for name, _ in merged.named_parameters()] == names
    assert all(p.requires_grad for p in merged.parameters())
    if "bias" not in fields:
        assert merged.q is layer


def test_merging_leaves_tied_weights_alone() -> None:
    model = net("a")
    model.tied = nn.Linear(8, 8, bias=False)
    model.tied.weight = model.q.base_layer.weight
    before = model.tied.weight.detach().clone()
    expected = model(X)
    torch.testing.assert_close(ff.unload(model, merge=True)(X), expected)
    assert torch.equal(model.tied.weight, before)


def test_a_layer_at_two_places_is_not_merged() -> None:
    model = net()
    model.twice = model.q
    ff.inject(model, config())
    for merge in (ff.fuse, lambda m: ff.unload(m, merge=True)):
        with pytest.raises(UsageError, match="occur once"):
            merge(model)


def test_replacing_values_in_place_compiles_nothing_again() -> None:
    """Other values and another seed; what an optimizer holds stays the same object."""
    model = net("a", modules_to_save=["head"])
    bundles = [
        ff.capture(net("b", random_loc_seed=seed, modules_to_save=["head"], bias="none"), "b")
        for seed in (777, 4)
    ]
    parameter = model.q.adapter("a").spectrum
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(X)
        for bundle in bundles:
            ff.replace(model, bundle, "a")
            base = ff.detach(copy.deepcopy(model))
            torch.testing.assert_close(compiled(X), ff.attach(base, bundle)(X))
            assert ff.capture(model, "a").to_bytes() == bundle.to_bytes()
    assert counter.frame_count == 1
    assert model.q.adapter("a").spectrum is parameter
    other = ff.capture(net("c", n_frequency=5), "c")
    with pytest.raises(BaseMismatchError) as caught:
        ff.replace(model, other, "a")
    assert "q: [9] here, [5] in the bundle" in caught.value.offenders
    assert "head.w: [8] here, nothing in the bundle" in caught.value.offenders


def test_save_pretrained_refuses_wrapper_names(make_model: Any, tmp_path: Path) -> None:
    model = make_model("bert-cls")
    ff.inject(model, ff.FourierFTConfig(n_frequency=9, task_type="SEQ_CLS"))
    for part in (model, model.bert, copy.deepcopy(model)):
        with pytest.raises(UsageError, match=r"capture\(.*unload\(model, merge=True\)"):
            part.save_pretrained(tmp_path / "model")
    tokens = torch.ones(2, 5, dtype=torch.long)
    expected = model(tokens).logits
    ff.unload(model, merge=True).save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-5, atol=1e-6)
