"""Selections compared with what PEFT itself selects on the same models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from fourierft_export import FourierFTConfig, inject
from fourierft_export.adapt.targets import USUAL_TARGETS, select
from fourierft_export.errors import UsageError

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"target_modules": ["query", "value"]}),
    ("bert", {"target_modules": ["attention.self.query"]}),
    ("bert", {"target_modules": ["encoder.layer.1.output.dense"]}),
    ("bert", {"target_modules": ["dense"]}),
    ("bert", {"target_modules": r".*layer\.[02]\..*(query|key)"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "ALL-LINEAR", "exclude_modules": ["pooler.dense"]}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": r".*output\.dense"}),
    ("bert", {"target_modules": ["dense", "query"], "exclude_modules": ["dense"]}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": 1}),
    ("bert", {"target_modules": ["query", "dense"], "layers_to_transform": [0, 2]}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": []}),
    (
        "bert",
        {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    (
        "bert",
        {
            "target_modules": ["query"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "encoder.layer"],
        },
    ),
    ("bert", {}),
    ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]}),
    (
        "bert",
        {
            "target_modules": ["query", "value"],
            "n_frequency_pattern": {"query": 7, r"layer\.1\..*value": 9, "value": 11},
        },
    ),
    (
        "bert",
        {
            "target_modules": ["query"],
            "n_frequency_pattern": {"encoder.layer.0.attention.self.query": 5},
        },
    ),
    ("bert-cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert-cls", {"target_modules": "all-linear"}),
    ("bert-cls", {"target_modules": ["dense"], "task_type": "SEQ_CLS"}),
    ("bert-token", {"target_modules": ["dense"], "task_type": "TOKEN_CLS"}),
    ("bert-qa", {"target_modules": ["key"], "task_type": "QUESTION_ANS"}),
    ("roberta-cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("roberta-cls", {"target_modules": "all-linear", "modules_to_save": ["out_proj"]}),
    ("distilbert-cls", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    ("llama", {}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["lm_head", "k_proj"]}),
    ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [2]}),
    ("llama-tied", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("llama-cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("t5", {}),
    ("t5", {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"}),
]


def peft_selection(model: Any) -> tuple[dict[str, int], set[str]]:
    """PEFT's adapted layers with their n, and the modules it saves whole."""
    from peft.tuners.fourierft.layer import FourierFTLinear
    from peft.utils.other import ModulesToSaveWrapper

    layers, saved = {}, set()
    for path, module in model.named_modules():
        plain = path.removeprefix("base_model.model.")
        if isinstance(module, FourierFTLinear):
            layers[plain] = module.fourierft_n_frequency["default"]
        elif isinstance(module, ModulesToSaveWrapper):
            saved.add(plain)
    return layers, saved


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_selection_is_pefts(
    make_model: Callable[[str], nn.Module],
    with_peft: Callable[..., Any],
    kind: str,
    fields: dict[str, Any],
) -> None:
    fields = {"n_frequency": 13} | fields
    layers, saved = peft_selection(with_peft(make_model(kind), **fields))
    ours = select(make_model(kind), FourierFTConfig(**fields))
    assert list(ours.targets.items()) == list(layers.items())
    assert set(ours.saved) == saved
    assert layers, "a case that selects nothing proves nothing"


def test_usual_targets_are_pefts() -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING as THEIRS

    ours = {k: v if isinstance(v, str) else list(v) for k, v in USUAL_TARGETS.items()}
    assert ours == THEIRS


def test_adding_a_second_adapter_sees_the_same_paths(
    make_model: Callable[[str], nn.Module],
) -> None:
    config = FourierFTConfig(n_frequency=13, target_modules="all-linear", bias="all")
    model = make_model("bert")
    before = select(model, config)
    inject(model, config, "first")
    assert select(model, config) == before


def refusal(model: nn.Module, **fields: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        select(model, FourierFTConfig(**fields))
    return caught.value


def test_nothing_matched_shows_near_names(make_model: Callable[[str], nn.Module]) -> None:
    error = refusal(make_model("bert"), target_modules=["qeury", "valeu", "zzz"])
    assert "query" in error.offenders[0]
    assert "value" in error.offenders[1]
    assert error.offenders[2] == "zzz: no similar name"
    assert "query, key, value" in error.remedy
    assert error.exit_code == 2


def test_nothing_left_after_exclusion_says_so(make_model: Callable[[str], nn.Module]) -> None:
    error = refusal(make_model("bert"), target_modules=["query"], exclude_modules=["query"])
    assert "exclude_modules" in error.found


def test_modules_of_other_types_are_all_named(make_model: Callable[[str], nn.Module]) -> None:
    error = refusal(make_model("bert"), target_modules=["query", "LayerNorm"])
    assert len(error.offenders) == 1 + 2 * 3
    assert "embeddings.LayerNorm: LayerNorm" in error.offenders


def test_n_frequency_larger_than_a_layer_names_all(make_model: Callable[[str], nn.Module]) -> None:
    error = refusal(make_model("bert"), target_modules=["query", "pooler.dense"], n_frequency=1025)
    assert len(error.offenders) == 4
    assert "32 x 32 has 1024 weights, found 1025" in error.offenders[0]
    config = FourierFTConfig(target_modules=["query"], n_frequency=1024)
    assert len(select(make_model("bert"), config).targets) == 3


def test_unknown_architecture_needs_targets(make_model: Callable[[str], nn.Module]) -> None:
    error = refusal(make_model("sequential"))
    assert "0, 3" in error.remedy
    assert "all-linear" in error.remedy


def test_modules_to_save_that_name_nothing(make_model: Callable[[str], nn.Module]) -> None:
    error = refusal(make_model("bert-cls"), modules_to_save=["clasifier"])
    assert "classifier" in error.remedy


def test_a_module_used_twice_is_adapted_where_peft_adapts_it(
    with_peft: Callable[..., Any],
) -> None:
    def shared() -> nn.Module:
        linear = nn.Linear(4, 4)
        return nn.ModuleDict({"first": linear, "other": nn.Linear(4, 4), "again": linear})

    fields: dict[str, Any] = {"n_frequency": 3, "target_modules": ["first", "again", "other"]}
    layers, _ = peft_selection(with_peft(shared(), **fields))
    assert select(shared(), FourierFTConfig(**fields)).targets == layers
    assert list(layers) == ["first", "other"]
