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

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.peft import from_peft, left_out, to_peft
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.spectral.delta import reference_delta

# Warnings that PEFT raises about itself while it saves and loads.
pytestmark = pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "SEQ_CLS", {"target_modules": ["query", "value"]}),
    "bert by default targets": ("bert", "SEQ_CLS", {}),
    "bert without a head": (
        "bert",
        "FEATURE_EXTRACTION",
        {"target_modules": r".*\.(query|value)"},
    ),
    "bert with every bias": ("bert", "SEQ_CLS", {"target_modules": ["query"], "bias": "all"}),
    "bert with the targets' biases": (
        "bert",
        "SEQ_CLS",
        {"target_modules": ["query"], "bias": "fourier_only"},
    ),
    "bert with a saved module": (
        "bert",
        "SEQ_CLS",
        {"target_modules": ["value"], "modules_to_save": ["pooler", "LayerNorm"]},
    ),
    "bert with a pattern": (
        "bert",
        "SEQ_CLS",
        {
            "target_modules": ["query", "value"],
            "n_frequency_pattern": {"1.attention.self.query": 7, "value": 25},
        },
    ),
    "bert with all-linear": ("bert", "SEQ_CLS", {"target_modules": "all-linear"}),
    "bert with layers and exclusions": (
        "bert",
        "SEQ_CLS",
        {"target_modules": ["query", "value"], "layers_to_transform": [1]},
    ),
    "bert with a whole scaling": ("bert", "SEQ_CLS", {"scaling": 100}),
    "bert with seed 0": ("bert", "SEQ_CLS", {"random_loc_seed": 0}),
    "bert with a negative seed": ("bert", "SEQ_CLS", {"random_loc_seed": -5}),
    "bert with a seed above 32 bits": ("bert", "SEQ_CLS", {"random_loc_seed": 2**40 + 3}),
    "bert with the largest seed": ("bert", "SEQ_CLS", {"random_loc_seed": 2**64 - 1}),
    "bert with n 1": ("bert", "SEQ_CLS", {"n_frequency": 1}),
    "bert with n M*N": ("bert", "SEQ_CLS", {"target_modules": ["query"], "n_frequency": 1024}),
    "llama": ("llama", "CAUSAL_LM", {"target_modules": ["q_proj", "v_proj"]}),
    "llama and its lm_head": ("llama", "CAUSAL_LM", {"target_modules": ["v_proj", "lm_head"]}),
    "tied llama and its lm_head": (
        "tied-llama",
        "CAUSAL_LM",
        {"target_modules": ["v_proj", "lm_head"]},
    ),
    "gpt2": ("gpt2", "CAUSAL_LM", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2 with biases": (
        "gpt2",
        "CAUSAL_LM",
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "bias": "all"},
    ),
}
LM_HEADS = ("llama and its lm_head", "tied llama and its lm_head")


def tensors_of(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes), read without the package."""
    data = (directory / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            e["dtype"],
            e["shape"],
            data[start + e["data_offsets"][0] : start + e["data_offsets"][1]],
        )
        for name, e in header.items()
    }


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text("utf-8"))
    return config


def without_base(adapter: Path, target: Path) -> Path:
    """A copy whose config names no base: it packs to an unbound bundle."""
    target.mkdir()
    config = config_of(adapter) | {"base_model_name_or_path": "someone/some-model"}
    (target / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (target / "adapter_model.safetensors").write_bytes(weights)
    return target


def check_round_trip(bundle: Bundle, adapter: Path, target: Path) -> None:
    """bundle -> bytes -> bundle -> directory gives back every tensor and every field."""
    to_peft(Bundle.from_bytes(bundle.to_bytes()), target)
    wanted = {n: t for n, t in tensors_of(adapter).items() if n not in left_out(adapter)}
    assert tensors_of(target) == wanted
    assert config_of(target) == config_of(adapter)
    assert type(config_of(target)["scaling"]) is type(config_of(adapter)["scaling"])


@pytest.mark.parametrize(("kind", "task", "fields"), CASES.values(), ids=CASES.keys())
def test_there_and_back(
    kind: str,
    task: str,
    fields: dict[str, Any],
    tiny_adapter: Callable[..., tuple[Path, Path]],
    peft_model: Callable[..., Any],
    tiny_outputs: Callable[..., Any],
    tmp_path: Path,
) -> None:
    import torch

    base, adapter = tiny_adapter(kind, task, **fields)
    bound = from_peft(adapter, base)
    assert bound.is_bound
    check_round_trip(bound, adapter, tmp_path / "bound")

    plain = without_base(adapter, tmp_path / "plain")
    unbound = from_peft(plain)
    assert not any(layer.is_bound for layer in unbound.layers)
    check_round_trip(unbound, plain, tmp_path / "unbound")

    original = peft_model(base, adapter, task)
    wanted = tiny_outputs(original)
    for name in ("bound", "unbound"):
        found = tiny_outputs(peft_model(base, tmp_path / name, task))
        assert torch.equal(found, wanted)

    # What the bundle says of each layer is what PEFT's layer does.
    names = set()
    for path, module in original.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            names.add(path)
            delta = module.get_delta_weight("default").detach().numpy()
            layer = bound.layer(path)
            assert layer.shape == delta.shape
            assert layer.fan_in_fan_out == (kind == "gpt2")
            found = reference_delta(
                bound.spectra[path], bound.entries(path), delta.shape, bound.spec.scaling
            )
            assert np.abs(found - delta).max() <= 1e-5 * np.abs(delta).max()
    assert names == {layer.name for layer in bound.layers}


@pytest.mark.parametrize("case", CASES)
def test_a_bundle_without_a_peft_config_opens_in_peft(
    case: str,
    tiny_adapter: Callable[..., tuple[Path, Path]],
    peft_model: Callable[..., Any],
    tiny_outputs: Callable[..., Any],
    tmp_path: Path,
) -> None:
    import torch

    kind, task, fields = CASES[case]
    base, adapter = tiny_adapter(kind, task, **fields)
    bundle = from_peft(adapter, base)
    plain = Bundle.build(replace(bundle.spec, peft_config={}), bundle.spectra, bundle.saved)
    to_peft(Bundle.from_bytes(plain.to_bytes()), tmp_path / "made")
    kept = {n: t for n, t in tensors_of(adapter).items() if n not in left_out(adapter)}
    assert tensors_of(tmp_path / "made") == kept
    wanted = tiny_outputs(peft_model(base, adapter, task))
    assert torch.equal(tiny_outputs(peft_model(base, tmp_path / "made", task)), wanted)


def test_only_the_bundles_own_layers_are_targeted(tmp_path: Path) -> None:
    """In a list, PEFT would take `lin` for every `*.lin` and leave those at random."""
    import torch
    from peft import PeftModel

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        parts = {"lin": torch.nn.Linear(4, 4), "a_lin": torch.nn.Linear(4, 4)}
        return torch.nn.ModuleDict(
            {**parts, "a": torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 4)})}
        )

    layers = (LayerSpec("lin", 3), LayerSpec("a.lin", 3))
    for chosen in (layers[:1], layers[1:], layers):
        spectra = {layer.name: np.ones(3, np.float32) for layer in chosen}
        bundle = Bundle.build(AdapterSpec(1, 2.0, chosen), spectra)
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        to_peft(bundle, target)
        adapted = PeftModel.from_pretrained(model(), target)
        found = {n for n, m in adapted.base_model.model.named_modules()
                 if hasattr(m, "get_delta_weight")}  # fmt: skip
        assert found == {layer.name for layer in chosen}


@pytest.mark.parametrize("case", LM_HEADS)
def test_the_base_weight_of_a_targeted_lm_head_is_left_out(
    case: str, tiny_adapter: Callable[..., tuple[Path, Path]]
) -> None:
    kind, task, fields = CASES[case]
    base, adapter = tiny_adapter(kind, task, **fields)
    assert left_out(adapter) == ["base_model.model.lm_head.base_layer.weight"]
    bundle = from_peft(adapter, base)
    assert "lm_head" in bundle.spectra
    assert not bundle.saved
    assert bundle.layer("lm_head").shape == (64, 32)


@pytest.mark.parametrize("n", [24, 7])
def test_bfloat16_spectra(
    n: int,
    tiny_adapter: Callable[..., tuple[Path, Path]],
    peft_model: Callable[..., Any],
    tiny_outputs: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Autocast off: PEFT saves the spectra in the base's dtype. 7 of them end off alignment."""
    import torch

    base, adapter = tiny_adapter(
        "bert", "SEQ_CLS", "bfloat16", target_modules=["query"], n_frequency=n
    )
    bundle = from_peft(adapter, base)
    assert {str(s.dtype) for s in bundle.spectra.values()} == {"bfloat16"}
    assert {m.fingerprint.dtype for m in bundle.layers if m.fingerprint} == {"BF16"}
    check_round_trip(bundle, adapter, tmp_path / "again")
    wanted = tiny_outputs(peft_model(base, adapter, "SEQ_CLS", "bfloat16"))
    found = tiny_outputs(peft_model(base, tmp_path / "again", "SEQ_CLS", "bfloat16"))
    assert torch.equal(found, wanted)


def test_tensors_of_mixed_dtypes_open_in_torch(
    tiny_adapter: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Odd counts of bfloat16 before float32 would leave the latter unaligned."""
    _, adapter = tiny_adapter(
        "bert", "SEQ_CLS", "bfloat16", target_modules=["query"], n_frequency=7
    )
    bundle = from_peft(adapter)
    saved = {name: array.astype(np.float32) for name, array in bundle.saved.items()}
    saved["steps"] = np.array(3, np.int64)
    to_peft(Bundle.build(bundle.spec, bundle.spectra, saved), tmp_path / "mixed")
    with safe_open(tmp_path / "mixed/adapter_model.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert read["base_model.model.steps"] == 3
    for name, array in saved.items():
        assert read[f"base_model.model.{name}"].numpy().tobytes() == array.tobytes()


def test_a_second_adapter_lies_in_a_subfolder(
    tiny_adapter: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    from peft import FourierFTConfig, PeftModel

    base, adapter = tiny_adapter("llama", "CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    config = FourierFTConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], n_frequency=9)
    model.add_adapter("other", config)
    model.save_pretrained(tmp_path / "both")
    default, other = from_peft(tmp_path / "both"), from_peft(tmp_path / "both", adapter="other")
    assert default.to_bytes() == from_peft(adapter).to_bytes()
    assert [layer.name for layer in other.layers] == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    ]
    to_peft(other, tmp_path / "again")
    assert tensors_of(tmp_path / "again") == tensors_of(tmp_path / "both/other")


def test_minilm_there_and_back(
    peft_minilm_adapter: Callable[..., Path],
    load_peft_minilm: Callable[[Path], Any],
    minilm_dir: Path,
    tokenize: Callable[..., dict[str, Any]],
    sst2_sentences: list[str],
    tmp_path: Path,
) -> None:
    """The real model: over the bare encoder, whose names lack the prefix `bert.`."""
    import torch

    adapter = peft_minilm_adapter(torch_seed=3)
    bundle = from_peft(adapter, minilm_dir)
    assert len(bundle.layers) == 12
    assert {layer.shape for layer in bundle.layers} == {(384, 384)}
    assert sorted(bundle.saved) == ["classifier.bias", "classifier.weight"]
    check_round_trip(bundle, adapter, tmp_path / "again")
    inputs = tokenize(sst2_sentences[:8])
    with torch.no_grad():
        wanted = load_peft_minilm(adapter)(**inputs).logits
        found = load_peft_minilm(tmp_path / "again")(**inputs).logits
    assert torch.equal(found, wanted)
    raw = 12 * 1000 * 4
    assert len(bundle.to_bytes()) < raw + 12 * 40 + 1200 + 384 * 2 * 4 + 2 * 4
