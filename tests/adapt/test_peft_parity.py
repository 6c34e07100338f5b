"""What PEFT's own tests check of a FourierFT adapter, checked here against PEFT itself.

Injection, gradients, training, heads and biases are in test_inject.py; selection in
test_targets.py; moving adapters between the two libraries in test_to_peft.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourierft_export import (
    FourierFTConfig,
    activate,
    attach,
    capture,
    detach,
    disabled,
    from_peft,
    fuse,
    inject,
    route,
)
from fourierft_export.adapt.modules import active_adapters, adapter_names, fourier_layers, is_fused
from fourierft_export.errors import BadInputError, UsageError
from tests.adapt.helpers import MakeModel, exact_delta, output

WithPeft = Callable[..., Any]

LLAMA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
KINDS: dict[str, dict[str, Any]] = {"llama": LLAMA, "gpt2": GPT2}
COMMON: dict[str, Any] = {"n_frequency": 40, "scaling": 30.0, "random_loc_seed": 11}


class Pair:
    """One base in both libraries, and the same adapters drawn from the same random numbers."""

    def __init__(
        self, make_model: MakeModel, kind: str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.kind = kind
        self.base = make_model(kind).to(dtype)
        self.ours = copy.deepcopy(self.base)
        self.theirs: Any = None

    def add(self, name: str, seed: int = 1, **fields: Any) -> Pair:
        from peft import FourierFTConfig as PeftConfig
        from peft import get_peft_model

        fields = COMMON | KINDS[self.kind] | fields
        torch.manual_seed(seed)
        if self.theirs is None:
            base = copy.deepcopy(self.base)
            config = PeftConfig(**fields)
            self.theirs = get_peft_model(base, config, name, autocast_adapter_dtype=False)
        else:
            self.theirs.add_adapter(name, PeftConfig(**fields), autocast_adapter_dtype=False)
        self.theirs.eval()
        torch.manual_seed(seed)
        inject(self.ours, FourierFTConfig(**fields), name)
        return self

    def activate(self, *names: str) -> Pair:
        self.theirs.base_model.set_adapter(list(names))
        activate(self.ours, names)
        return self

    def outputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return output(self.ours, tokens), output(self.theirs, tokens)

    def check(self, tokens: Tensor, changed: bool = True) -> None:
        """Both answer the same, and (if `changed`) not what the base answers."""
        found, expected = self.outputs(tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            apart = (found - output(self.base, tokens)).abs().max()
        assert apart > 1e-3 if changed else apart < 1e-5


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, make_model: MakeModel) -> Pair:
    return Pair(make_model, request.param).add("a").add("b", seed=2, random_loc_seed=5, scaling=9)


def weights64(pair: Pair, names: list[str]) -> dict[str, Tensor]:
    """Path -> W + sum of delta_W in float64, from the definition."""
    exact = {}
    for path, layer in fourier_layers(pair.ours).items():
        weight = pair.base.get_submodule(path).weight.detach().double()
        delta = exact_delta(layer, *names)
        exact[path] = weight + (delta.T if layer.transposed else delta)
    return exact


# Merging


@pytest.mark.parametrize("names", [["a", "b"], ["b", "a"]])
def test_merge_of_several_is_the_sum_in_any_order(
    pair: Pair, tokens: Tensor, names: list[str]
) -> None:
    fuse(pair.ours, names)
    pair.theirs.merge_adapter(names)
    pair.check(tokens)
    for path, exact in weights64(pair, ["a", "b"]).items():
        fused = fourier_layers(pair.ours)[path].weight
        torch.testing.assert_close(fused.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged(pair: Pair, tokens: Tensor, bad: float) -> None:
    """What PEFT checks with safe_merge=True is always checked, in every layer, at once."""
    pair.activate("b")
    good, _ = pair.outputs(tokens)
    pair.activate("a")
    broken = list(fourier_layers(pair.ours))[1:3]
    with torch.no_grad():
        for path in broken:
            fourier_layers(pair.ours)[path].adapter("a").spectrum[0] = bad
            pair.theirs.base_model.model.get_submodule(path).fourierft_spectrum["a"][0] = bad
    with pytest.raises(ValueError, match="NaNs detected"):
        pair.theirs.merge_adapter(safe_merge=True)
    with pytest.raises(UsageError, match="merged weights") as caught:
        fuse(pair.ours)
    assert [line.split(".weight:")[0] for line in caught.value.offenders] == broken
    assert not is_fused(pair.ours)
    with pytest.raises(BadInputError):
        capture(pair.ours, "a")
    pair.activate("b")
    assert torch.equal(pair.outputs(tokens)[0], good)
    fuse(pair.ours, "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_in_half_precision_is_no_worse_than_pefts(
    make_model: MakeModel, tokens: Tensor, kind: str, dtype: torch.dtype
) -> None:
    pair = Pair(make_model, kind, dtype).add("a")
    exact = weights64(pair, ["a"])
    unmerged, expected = pair.outputs(tokens)
    assert unmerged.dtype == expected.dtype == dtype
    scale = expected.abs().max()
    assert (unmerged - expected).abs().max() <= 16 * torch.finfo(dtype).eps * scale
    fuse(pair.ours)
    pair.theirs.merge_adapter()
    wrong = [0.0, 0.0]
    for path, weight in exact.items():
        mine = fourier_layers(pair.ours)[path].weight.double()
        peft = pair.theirs.base_model.model.get_submodule(path).base_layer.weight.double()
        wrong[0] += (mine - weight).square().sum().item()
        wrong[1] += (peft - weight).square().sum().item()
    assert wrong[0] <= wrong[1]


# Several adapters: activating, disabling, deleting


def test_adapters_on_different_layers(make_model: MakeModel, tokens: Tensor) -> None:
    pair = Pair(make_model, "llama")
    pair.add("a", target_modules=["q_proj"]).add("b", seed=2, target_modules=["up_proj", "q_proj"])
    pair.add("c", seed=3, target_modules=["lm_head"])
    for names in (["a"], ["b"], ["c"], ["a", "c"], ["b", "a"], ["c", "a", "b"]):
        pair.activate(*names).check(tokens)
        learning = sorted(
            name.replace(".base_layer", "").replace("base_model.model.", "")
            for name, p in pair.theirs.named_parameters()
            if p.requires_grad
        )
        mine = sorted(
            f"{path}.fourierft_spectrum.{name}"
            for path, layer in fourier_layers(pair.ours).items()
            for name in layer.adapters
            if layer.adapter(name).spectrum.requires_grad
        )
        assert mine == learning
        assert len(mine) == sum(p.requires_grad for p in pair.ours.parameters())


def test_disabling(pair: Pair, tokens: Tensor) -> None:
    pair.activate("a", "b")
    before, _ = pair.outputs(tokens)
    learning = [n for n, p in pair.ours.named_parameters() if p.requires_grad]
    with disabled(pair.ours) as model, pair.theirs.disable_adapter():
        assert model is pair.ours
        pair.check(tokens, changed=False)
        assert torch.equal(output(pair.ours, tokens), output(pair.base, tokens))
        assert not any(p.requires_grad for p in pair.ours.parameters())
        with disabled(pair.ours):
            pair.check(tokens, changed=False)
        pair.check(tokens, changed=False)
    pair.check(tokens)
    assert torch.equal(pair.outputs(tokens)[0], before)
    assert [n for n, p in pair.ours.named_parameters() if p.requires_grad] == learning
    with pytest.raises(RuntimeError, match="stop"), disabled(pair.ours):
        raise RuntimeError("stop")
    assert torch.equal(pair.outputs(tokens)[0], before)


def test_what_changes_while_disabled(pair: Pair, tokens: Tensor) -> None:
    pair.activate("a")
    before, _ = pair.outputs(tokens)
    with disabled(pair.ours):
        inject(pair.ours, FourierFTConfig(n_frequency=4, target_modules="all-linear"), "c")
        detach(pair.ours, "b")
    assert (adapter_names(pair.ours), active_adapters(pair.ours)) == (("a", "c"), ("a",))
    assert torch.equal(pair.outputs(tokens)[0], before)
    fuse(pair.ours, ["a", "c"])
    with disabled(pair.ours):
        detach(pair.ours, "c")
    assert not is_fused(pair.ours)
    assert torch.equal(pair.outputs(tokens)[0], before)
    with route(pair.ours, ["a", None, "a"]), pytest.raises(UsageError), disabled(pair.ours):
        pass
    with disabled(pair.ours):
        detach(pair.ours)
    assert torch.equal(pair.outputs(tokens)[0], output(pair.base, tokens))


@pytest.mark.parametrize("gone", ["a", "b"])
def test_deleting_the_active_and_the_idle_one(pair: Pair, tokens: Tensor, gone: str) -> None:
    pair.activate("a")
    detach(pair.ours, gone)
    pair.theirs.delete_adapter(gone)
    left = "b" if gone == "a" else "a"
    assert adapter_names(pair.ours) == (left,)
    # With the active one gone PEFT activates another; here none is active until `activate`.
    assert active_adapters(pair.ours) == (() if gone == "a" else ("a",))
    assert not any(f".{gone}." in name for name in pair.ours.state_dict())
    pair.activate(left).check(tokens)
    with pytest.raises(UsageError, match="no adapter of that name"):
        detach(pair.ours, gone)
    with pytest.raises(ValueError, match="does not exist"):
        pair.theirs.delete_adapter(gone)
    pair.add(gone, seed=7, n_frequency=11)
    pair.activate(gone).check(tokens)
    pair.activate(left, gone).check(tokens)


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_in_half_precision(
    make_model: MakeModel, with_peft: WithPeft, tokens: Tensor, dtype: torch.dtype, autocast: bool
) -> None:
    """Spectra are float32 whatever the base is; loss and gradients are those of PEFT's."""
    fields = COMMON | LLAMA
    base = make_model("llama").to(torch.float32 if autocast else dtype)
    theirs = with_peft(copy.deepcopy(base), seed=1, **fields)
    torch.manual_seed(1)
    ours: Any = inject(base, FourierFTConfig(**fields))
    found = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        spectra = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in spectra} == {torch.float32}
        assert all(p.grad.dtype == torch.float32 for p in spectra)
        found.append((loss.item(), torch.cat([p.grad for p in spectra])))
    eps = torch.finfo(dtype).eps
    assert found[0][0] == pytest.approx(found[1][0], rel=2 * eps)
    # PEFT rounds x to the spectrum's dtype and back, and the other way round: 8 roundings' worth.
    assert (found[0][1] - found[1][1]).norm() <= 8 * eps * found[1][1].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_whole_model(pair: Pair, tokens: Tensor, dtype: torch.dtype) -> None:
    pair.activate("a", "b")
    pair.ours.to(dtype)
    pair.theirs.to(dtype)
    assert {p.dtype for p in pair.ours.parameters()} == {dtype}
    found, expected = pair.outputs(tokens)
    assert found.dtype == dtype
    # PEFT computes delta_W in float32 even for float64.
    bound = max(torch.finfo(dtype).eps * 16, 1e-6)
    assert (found - expected).abs().max() <= bound * expected.abs().max()


# Training


def test_only_the_active_adapters_parameters_change(pair: Pair, tokens: Tensor) -> None:
    pair.activate("b")
    changed = []
    for model in (pair.ours, pair.theirs):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer = torch.optim.AdamW(list(model.parameters()), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        after = model.state_dict()
        changed.append([k for k in before if not torch.equal(before[k], after[k])])
    assert len(changed[0]) == len(changed[1]) == len(fourier_layers(pair.ours))
    assert all(".adapters.b.spectrum" in name for name in changed[0])
    found, expected = pair.outputs(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_inputs_that_want_gradients(pair: Pair, tokens: Tensor) -> None:
    pair.activate("a", "b")
    grads = []
    for model in (pair.ours, pair.theirs):
        embedded = pair.base.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        grads.append(embedded.grad)
    scale = grads[1].abs().max().item()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5 * scale)


def test_eval_and_train_mode_pass_through(make_model: MakeModel, tokens: Tensor) -> None:
    for training in (True, False):
        model = make_model("bert-cls").train(training)
        inject(model, FourierFTConfig(n_frequency=9, task_type="SEQ_CLS", bias="all"))
        inject(model, FourierFTConfig(n_frequency=9), "second")
        assert {m.training for m in model.modules()} == {training}
        model.train(not training)
        assert {m.training for m in model.modules()} == {not training}
    weights = [layer.kept_weight for layer in fourier_layers(model).values()]
    assert weights == [None] * len(weights)  # no mode merges anything


# Generation


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generated_tokens(make_model: MakeModel, tokens: Tensor, settings: dict[str, Any]) -> None:
    pair = Pair(make_model, "llama").add("a")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | settings
    found = pair.ours.generate(tokens, **settings)
    base = pair.base.generate(tokens, **settings)
    assert found.shape == (3, 14)
    assert not torch.equal(found, base)
    assert torch.equal(found, pair.theirs.generate(input_ids=tokens, **settings))
    assert torch.equal(fuse(pair.ours).generate(tokens, **settings), found)


# Loading, copying, saving


def test_loading_without_memory_to_spare(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path
) -> None:
    """PEFT's low_cpu_mem_usage: nothing is drawn at random only to be overwritten."""
    from peft import PeftModel

    pair = Pair(make_model, "llama").add("default")
    pair.theirs.save_pretrained(tmp_path)
    lean = PeftModel.from_pretrained(copy.deepcopy(pair.base), tmp_path, low_cpu_mem_usage=True)
    with torch.no_grad():
        expected = output(lean.eval(), tokens)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    loaded = attach(copy.deepcopy(pair.base), from_peft(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        torch.testing.assert_close(output(loaded, tokens), expected, rtol=1e-5, atol=1e-6)


def test_pickles_and_copies_are_independent(pair: Pair, tokens: Tensor) -> None:
    pair.activate("a", "b")
    before, _ = pair.outputs(tokens)
    buffer = io.BytesIO()
    torch.save(pair.ours, buffer)
    buffer.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(pair.ours)),
        copy.deepcopy(pair.ours),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(output(twin, tokens), before)
        assert active_adapters(twin) == ("a", "b")
        with torch.no_grad():
            for layer in fourier_layers(twin).values():
                layer.adapter("a").spectrum.zero_()
        detach(twin, "b")
        assert torch.equal(pair.outputs(tokens)[0], before)
        assert torch.equal(output(activate(twin, "a"), tokens), output(pair.base, tokens))


def test_state_dicts_hold_what_pefts_hold(pair: Pair) -> None:
    """The same tensors under each library's names: no entries, no random numbers, no doubles."""
    mine = {
        name.replace(".adapters.", ".fourierft_spectrum.").removesuffix(".spectrum"): value
        for name, value in pair.ours.state_dict().items()
    }
    theirs = {
        name.removeprefix("base_model.model."): value
        for name, value in pair.theirs.state_dict().items()
    }
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# Embeddings


def test_an_adapted_head_over_tied_embeddings(make_model: MakeModel, tokens: Tensor) -> None:
    """The embeddings stay as they are and tied; the head's change is the head's alone."""
    pair = Pair(make_model, "llama")
    pair.base = make_model("llama-tied")
    pair.ours = copy.deepcopy(pair.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it would merge into the embeddings
        pair.add("a", target_modules=["lm_head", "q_proj"])
    pair.check(tokens)
    head = fourier_layers(pair.ours)["lm_head"]
    embeddings = pair.ours.get_input_embeddings().weight
    assert head.base_layer.weight is embeddings
    fused = output(fuse(pair.ours), tokens)
    torch.testing.assert_close(fused, pair.outputs(tokens)[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(embeddings, pair.base.get_input_embeddings().weight)
    assert detach(pair.ours).lm_head.weight is embeddings


# Other architectures, saved modules


def test_encoder_and_decoder(make_model: MakeModel, with_peft: WithPeft, tokens: Tensor) -> None:
    fields = COMMON | {"task_type": "SEQ_2_SEQ_LM"}  # the usual targets: q and v, in both halves
    base = make_model("t5")
    theirs = with_peft(copy.deepcopy(base), seed=1, **fields)
    torch.manual_seed(1)
    ours: Any = inject(copy.deepcopy(base), FourierFTConfig(**fields))
    assert len(fourier_layers(ours)) == 2 * (2 + 2 + 2)  # T5 attends across, too
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    with torch.no_grad():
        found, expected = ours(**inputs).logits, theirs(**inputs).logits
        apart = (found - base(**inputs).logits).abs().max()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert apart > 1e-3
    settings = {"max_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 0}
    generated = ours.generate(tokens, **settings)
    assert torch.equal(generated, theirs.generate(input_ids=tokens, **settings))
    assert torch.equal(fuse(ours).generate(tokens, **settings), generated)


def test_modules_saved_by_different_adapters(make_model: MakeModel, tokens: Tensor) -> None:
    """Different modules may be active together, the same one may not: in PEFT, too."""
    pair = Pair(make_model, "llama")
    pair.add("a", modules_to_save=["lm_head"]).add("b", seed=2, modules_to_save=["up_proj"])
    with torch.no_grad():
        for model in (pair.ours, pair.theirs):
            for name, parameter in model.named_parameters():
                if ("modules_to_save" in name or ".versions." in name) and parameter.ndim == 2:
                    parameter.mul_(1.5)
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        pair.activate(*names).check(tokens)
    pair.add("c", seed=3, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save"):
        pair.theirs.base_model.set_adapter(["a", "c"])
    with pytest.raises(UsageError) as caught:
        activate(pair.ours, ["a", "c"])
    assert caught.value.offenders == ("lm_head: a and c both have their own",)
    detach(pair.ours, "a")
    pair.theirs.delete_adapter("a")
    pair.activate("c", "b").check(tokens)


def test_all_settings_at_once(make_model: MakeModel, tokens: Tensor) -> None:
    """n_frequency by pattern, block numbers, a trained head, biases: ten steps as PEFT's."""
    from peft import FourierFTConfig as PeftConfig
    from peft import get_peft_model

    fields = COMMON | {
        "target_modules": ["query", "value", "dense"],
        "exclude_modules": ["pooler.dense"],
        "layers_to_transform": [0, 2],
        "n_frequency_pattern": {"query": 17, r"layer\.2\.output\.dense": 5},
        "task_type": "SEQ_CLS",
        "bias": "fourier_only",
        "init_weights": True,
    }
    labels = torch.tensor([0, 1, 2])
    seen = []
    base = make_model("bert-cls")
    for adapt, make_config in ((inject, FourierFTConfig), (get_peft_model, PeftConfig)):
        torch.manual_seed(1)
        model: Any = adapt(copy.deepcopy(base), make_config(**fields))
        model.eval()
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        counts = sorted(p.numel() for p in learning.values())
        optimizer = torch.optim.AdamW(learning.values(), lr=3e-2)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seen.append((counts, losses))
    assert seen[0][0] == seen[1][0]
    assert {5, 17, 40} <= set(seen[0][0])
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-5)
    assert seen[0][1][-1] < 0.8 * seen[0][1][0]
