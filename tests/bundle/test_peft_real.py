"""PEFT's own adapters, there and back: bit for bit, and to the same outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from fourierft_export import Bundle, from_peft, to_peft
from fourierft_export.bundle.peft import left_out
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.spectral.delta import reference_delta

# Warnings that PEFT raises about itself while it saves and loads.
pytestmark = pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")

Make = Callable[..., Path]
QV = {"target_modules": ["query", "value"]}
C_ATTN = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "without a head": ("bert", {"target_modules": r".*\.(query|value)"}),
    "every bias": ("bert-cls", {"target_modules": ["query"], "bias": "all"}),
    "the targets' biases": ("bert-cls", {"target_modules": ["query"], "bias": "fourier_only"}),
    "a saved module": (
        "bert-cls",
        {"target_modules": ["value"], "modules_to_save": ["pooler", "LayerNorm"]},
    ),
    "a pattern": (
        "bert-cls",
        QV | {"n_frequency_pattern": {"1.attention.self.query": 7, "value": 25}},
    ),
    "all-linear": ("bert-cls", {"target_modules": "all-linear", "scaling": 100}),
    "layers": ("bert-cls", QV | {"layers_to_transform": [1], "random_loc_seed": -5}),
    "the largest seed, n 1": ("bert-cls", {"random_loc_seed": 2**64 - 1, "n_frequency": 1}),
    "n M*N": ("bert-cls", {"target_modules": ["query"], "n_frequency": 1024}),
    "lm_head": ("llama", {"target_modules": ["v_proj", "lm_head"]}),
    "tied lm_head": ("llama-tied", {"target_modules": ["v_proj", "lm_head"]}),
    "gpt2": ("gpt2", C_ATTN),
    "gpt2 and biases": (
        "gpt2",
        C_ATTN | {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "all"},
    ),
}


def tensors_of(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes), read without the package."""
    data = (directory / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    spans = {name: slice(*(start + at for at in e["data_offsets"])) for name, e in header.items()}
    return {name: (e["dtype"], e["shape"], data[spans[name]]) for name, e in header.items()}


def check_round_trip(bundle: Bundle, adapter: Path, target: Path) -> None:
    """bundle -> bytes -> bundle -> directory gives back every tensor and every field."""
    to_peft(Bundle.from_bytes(bundle.to_bytes()), target)
    wanted = {n: t for n, t in tensors_of(adapter).items() if n not in left_out(adapter)}
    assert tensors_of(target) == wanted
    before, after = (json.loads((d / "adapter_config.json").read_text()) for d in (adapter, target))
    assert after == before
    assert type(after["scaling"]) is type(before["scaling"])


def outputs(model: Any) -> Any:
    import torch

    ids = torch.arange(20).reshape(2, 10) * 7 % 63 + 1
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(
    case: str, tiny_base: Make, tiny_adapter: Make, load_peft: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    kind, fields = CASES[case]
    base, adapter = tiny_base(kind), tiny_adapter(kind, **fields)
    bound, unbound = from_peft(adapter, base), from_peft(adapter)
    assert bound.is_bound
    assert not any(layer.is_bound for layer in unbound.layers)
    # PEFT saves the base's own weight of a targeted output embedding, and copies of biases.
    extra = [name for name in left_out(adapter) if "_module.bias" not in name]
    extra = [name for name in extra if "modules_to_save.bias" not in name]
    assert extra == (["base_model.model.lm_head.base_layer.weight"] if "lm_head" in case else [])
    assert "lm_head.weight" not in bound.saved
    check_round_trip(bound, adapter, tmp_path / "bound")
    check_round_trip(unbound, adapter, tmp_path / "unbound")
    # One that does not come from PEFT gets a config by which PEFT finds the same layers.
    plain = Bundle.build(replace(bound.spec, peft_config={}), bound.spectra, bound.saved)
    to_peft(Bundle.from_bytes(plain.to_bytes()), tmp_path / "made")
    assert tensors_of(tmp_path / "made") == tensors_of(tmp_path / "bound")

    original = load_peft(base, adapter)
    wanted = outputs(original)
    for name in ("bound", "made"):
        assert torch.equal(outputs(load_peft(base, tmp_path / name)), wanted)
    # What the bundle says of each layer is what PEFT's layer does.
    theirs = {
        path: module.get_delta_weight("default").detach().numpy()
        for path, module in original.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert theirs.keys() == bound.spectra.keys()
    for path, delta in theirs.items():
        layer = bound.layer(path)
        assert (layer.shape, layer.fan_in_fan_out) == (delta.shape, kind == "gpt2")
        found = reference_delta(
            bound.spectra[path], bound.entries(path), delta.shape, bound.spec.scaling
        )
        assert np.abs(found - delta).max() <= 1e-5 * np.abs(delta).max()


def test_only_the_bundles_own_layers_are_targeted(tmp_path: Path) -> None:
    """In a list, PEFT would take `lin` for every `*.lin` and leave those at random."""
    import torch
    from peft import PeftModel

    def linear() -> torch.nn.Linear:
        return torch.nn.Linear(4, 4)

    layers = (LayerSpec("lin", 5), LayerSpec("a.lin", 3))
    for chosen in (layers[:1], layers[1:], layers):
        spectra = {m.name: np.full(m.n_frequency, m.n_frequency, np.float32) for m in chosen}
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        to_peft(Bundle.build(AdapterSpec(1, 2.0, chosen), spectra), target)
        inner = torch.nn.ModuleDict({"lin": linear()})
        model = torch.nn.ModuleDict({"lin": linear(), "a_lin": linear(), "a": inner})
        modules = PeftModel.from_pretrained(model, target).base_model.model.named_modules()
        found = {
            name: module.fourierft_spectrum["default"].tolist()
            for name, module in modules
            if hasattr(module, "get_delta_weight")
        }
        assert found == {name: spectrum.tolist() for name, spectrum in spectra.items()}


def bfloat16_adapter(base: Path, target: Path, n: int) -> Path:
    """PEFT's adapter of a bfloat16 base with autocast off: spectra in the base's dtype."""
    import torch
    from peft import FourierFTConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16)
    config = FourierFTConfig(task_type="SEQ_CLS", target_modules=["query"], n_frequency=n)
    torch.manual_seed(1)
    get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(target)
    return target


@pytest.mark.parametrize("n", [24, 7])
def test_bfloat16_spectra(
    n: int, tiny_base: Make, load_peft: Callable[..., Any], tmp_path: Path
) -> None:
    """7 of them end off alignment: torch would refuse the float32 behind them."""
    import torch

    base = tiny_base("bert-cls", "bfloat16")
    adapter = bfloat16_adapter(base, tmp_path / "adapter", n)
    bundle = from_peft(adapter, base)
    assert {str(s.dtype) for s in bundle.spectra.values()} == {"bfloat16"}
    assert {m.fingerprint.dtype for m in bundle.layers if m.fingerprint} == {"BF16"}
    check_round_trip(bundle, adapter, tmp_path / "again")
    wanted = outputs(load_peft(base, adapter, "bfloat16"))
    assert torch.equal(outputs(load_peft(base, tmp_path / "again", "bfloat16")), wanted)
    saved = {name: array.astype(np.float32) for name, array in bundle.saved.items()}
    saved["steps"] = np.array(3, np.int64)
    to_peft(Bundle.build(bundle.spec, bundle.spectra, saved), tmp_path / "mixed")
    with safe_open(tmp_path / "mixed/adapter_model.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, array in saved.items():
        assert read[f"base_model.model.{name}"].numpy().tobytes() == array.tobytes()


def test_a_second_adapter_lies_in_a_subfolder(
    tiny_base: Make, tiny_adapter: Make, load_peft: Callable[..., Any], tmp_path: Path
) -> None:
    from peft import FourierFTConfig

    adapter = tiny_adapter("llama", target_modules=["q_proj", "v_proj"])
    model = load_peft(tiny_base("llama"), adapter)
    config = FourierFTConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], n_frequency=9)
    model.add_adapter("other", config)
    model.save_pretrained(tmp_path / "both")
    default, other = from_peft(tmp_path / "both"), from_peft(tmp_path / "both", adapter="other")
    plain = from_peft(adapter)
    assert {n: s.tobytes() for n, s in default.spectra.items()} == {
        n: s.tobytes() for n, s in plain.spectra.items()
    }
    assert [layer.name for layer in other.layers] == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    ]
    to_peft(other, tmp_path / "again")
    assert tensors_of(tmp_path / "again") == tensors_of(tmp_path / "both/other")
