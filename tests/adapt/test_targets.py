"""Selections compared with what PEFT itself selects on the same models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from fourierft_export import FourierFTConfig, inject
from fourierft_export.adapt.targets import USUAL_TARGETS, select
from fourierft_export.errors import UsageError

# (kind of model, target_modules or None for the usual ones, other fields)
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("bert", ["query", "value"], {}),
    ("bert", ["attention.self.query"], {}),
    ("bert", ["encoder.layer.1.output.dense"], {}),
    ("bert", ["dense"], {}),
    ("bert", r".*layer\.[02]\..*(query|key)", {}),
    ("bert", "all-linear", {}),
    ("bert", "ALL-LINEAR", {"exclude_modules": ["pooler.dense"]}),
    ("bert", ["dense"], {"exclude_modules": r".*output\.dense"}),
    ("bert", ["dense", "query"], {"exclude_modules": ["dense"]}),
    ("bert", ["query"], {"layers_to_transform": 1}),
    ("bert", ["query", "dense"], {"layers_to_transform": [0, 2]}),
    ("bert", ["query"], {"layers_to_transform": []}),
    ("bert", ["dense"], {"layers_to_transform": [1], "layers_pattern": "layer"}),
    ("bert", ["query"], {"layers_to_transform": [1], "layers_pattern": ["h", "encoder.layer"]}),
    ("bert", None, {}),
    ("bert", ["query", "dense"], {"modules_to_save": ["pooler"]}),
    (
        "bert",
        ["query", "value"],
        {"n_frequency_pattern": {"query": 7, r"layer\.1\..*value": 9, "value": 11}},
    ),
    ("bert", ["query"], {"n_frequency_pattern": {"encoder.layer.0.attention.self.query": 5}}),
    ("bert-cls", "all-linear", {"task_type": "SEQ_CLS"}),
    ("bert-cls", "all-linear", {}),
    ("bert-cls", ["dense"], {"task_type": "SEQ_CLS"}),
    ("bert-token", ["dense"], {"task_type": "TOKEN_CLS"}),
    ("bert-qa", ["key"], {"task_type": "QUESTION_ANS"}),
    ("roberta-cls", "all-linear", {"task_type": "SEQ_CLS"}),
    ("roberta-cls", "all-linear", {"modules_to_save": ["out_proj"]}),
    ("distilbert-cls", ["q_lin"], {"task_type": "SEQ_CLS"}),
    ("llama", None, {}),
    ("llama", "all-linear", {}),
    ("llama", ["lm_head", "k_proj"], {}),
    ("llama", ["o_proj"], {"layers_to_transform": [2]}),
    ("llama-tied", "all-linear", {"task_type": "CAUSAL_LM"}),
    ("llama-cls", "all-linear", {"task_type": "SEQ_CLS"}),
    ("gpt2", None, {}),
    ("gpt2", ["c_attn", "c_fc"], {}),
    ("gpt2", "all-linear", {}),
    ("gpt2", ["c_proj"], {"layers_to_transform": [1], "layers_pattern": "h"}),
    ("t5", None, {}),
    ("t5", ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", {}),
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


@pytest.mark.parametrize(("kind", "targets", "fields"), CASES)
def test_selection_is_pefts(
    make_model: Callable[[str], nn.Module],
    with_peft: Callable[..., Any],
    kind: str,
    targets: Any,
    fields: dict[str, Any],
) -> None:
    fields = {"n_frequency": 13, "target_modules": targets} | fields
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


REFUSED: list[tuple[str, dict[str, Any], str, list[str]]] = [
    (
        "bert",
        {"target_modules": ["qeury", "valeu", "zzz"]},
        "query, key, value",
        ["qeury: did you mean query", "valeu: did you mean value", "zzz: no similar name"],
    ),
    ("bert", {"target_modules": ["query"], "exclude_modules": ["query"]}, "exclude_modules", []),
    (
        "bert",
        {"target_modules": ["query", "LayerNorm"]},
        "7 of 10 matched modules of other types",
        ["embeddings.LayerNorm: LayerNorm"],
    ),
    (
        "bert",
        {"target_modules": ["query", "pooler.dense"], "n_frequency": 1025},
        "4 layers that are smaller",
        ["encoder.layer.0.attention.self.query: 32 x 32 has 1024 weights, found 1025"],
    ),
    ("sequential", {}, "0, 3, or use 'all-linear'", []),
    ("bert-cls", {"modules_to_save": ["clasifier"]}, "classifier", []),
]


@pytest.mark.parametrize(("kind", "fields", "message", "offenders"), REFUSED)
def test_what_is_refused(
    make_model: Callable[[str], nn.Module],
    kind: str,
    fields: dict[str, Any],
    message: str,
    offenders: list[str],
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        select(make_model(kind), FourierFTConfig(**fields))
    for found, wanted in zip(caught.value.offenders, offenders, strict=False):
        assert found.startswith(wanted)
    assert len(caught.value.offenders) >= len(offenders)


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
