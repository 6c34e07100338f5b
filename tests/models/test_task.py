"""Tasks and architectures from configs, labels from heads."""

from __future__ import annotations

from typing import Any

import pytest

from fourierft_export.errors import UsageError
from fourierft_export.models.task import (
    ALIASES,
    TASKS,
    architecture_for,
    auto_class_for,
    choose_task,
    get_task,
    head_labels,
)

FEATURES, CLASSES, CAUSAL, TOKENS, ANSWERS, IMAGES, ENCODER = TASKS


@pytest.mark.parametrize(
    ("architectures", "task_type", "task"),
    [
        (["BertModel"], "SEQ_CLS", CLASSES),  # the head is only in the adapter
        (["LlamaForCausalLM"], "SEQ_CLS", CLASSES),
        (["BertModel"], "FEATURE_EXTRACTION", FEATURES),
        ([], "CAUSAL_LM", CAUSAL),
        (["BertModel"], None, FEATURES),
        (["BertForSequenceClassification"], None, CLASSES),
        (["LlamaForCausalLM"], None, CAUSAL),
        (["GPT2LMHeadModel"], None, CAUSAL),
        (["GPT2Model"], None, FEATURES),
        (["BertModel"], "TOKEN_CLS", TOKENS),
        (["BertForTokenClassification"], None, TOKENS),
        (["BertModel"], "QUESTION_ANS", ANSWERS),
        (["DistilBertForQuestionAnswering"], None, ANSWERS),
        (["ViTForImageClassification"], None, IMAGES),
        (["ViTModel"], None, FEATURES),
        (["T5ForConditionalGeneration"], None, ENCODER),
        (["T5ForConditionalGeneration"], "SEQ_2_SEQ_LM", ENCODER),
        (["T5EncoderModel"], None, ENCODER),
        (["T5EncoderModel"], "FEATURE_EXTRACTION", FEATURES),
    ],
)
def test_infer(architectures: list[str], task_type: str | None, task: str) -> None:
    assert choose_task(None, {"architectures": architectures}, task_type).name == task


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": 5},
        {"architectures": "BertModel"},
        {"architectures": [5]},
        {"architectures": {"a": 1}},
    ],
)
def test_what_does_not_tell_is_an_error_that_names_the_option(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--task"):
        choose_task(None, config, None)


def test_unknown_tasks() -> None:
    with pytest.raises(UsageError, match="found 'causal'"):
        get_task("causal")


def test_names_are_those_of_pipelines_and_old_ones_still_count() -> None:
    from transformers.pipelines import SUPPORTED_TASKS

    # transformers 5 has no pipeline for answers any more.
    assert set(TASKS) - set(SUPPORTED_TASKS) <= {ENCODER, ANSWERS}
    assert ALIASES == {"sequence-classification": CLASSES, "causal-lm": CAUSAL}
    for old, name in ALIASES.items():
        assert get_task(old).name == choose_task(old, {}, "TOKEN_CLS").name == name


@pytest.mark.parametrize(
    ("architecture", "task", "wanted"),
    [
        ("BertModel", CLASSES, "BertForSequenceClassification"),
        ("BertModel", FEATURES, "BertModel"),
        ("BertModel", CAUSAL, "BertForCausalLM"),
        ("BertForMaskedLM", CLASSES, "BertForSequenceClassification"),
        ("BertForSequenceClassification", CLASSES, "BertForSequenceClassification"),
        ("BertForSequenceClassification", FEATURES, "BertModel"),
        ("BertLMHeadModel", CLASSES, "BertForSequenceClassification"),
        ("LlamaForCausalLM", CLASSES, "LlamaForSequenceClassification"),
        ("LlamaForCausalLM", CAUSAL, "LlamaForCausalLM"),
        ("LlamaForCausalLM", FEATURES, "LlamaModel"),
        ("GPT2LMHeadModel", CAUSAL, "GPT2LMHeadModel"),
        ("GPT2LMHeadModel", FEATURES, "GPT2Model"),
        ("GPT2LMHeadModel", CLASSES, "GPT2ForSequenceClassification"),
        ("XLMRobertaModel", CLASSES, "XLMRobertaForSequenceClassification"),
        ("BertModel", TOKENS, "BertForTokenClassification"),
        ("GPT2LMHeadModel", TOKENS, "GPT2ForTokenClassification"),
        ("DistilBertModel", ANSWERS, "DistilBertForQuestionAnswering"),
        ("ViTModel", IMAGES, "ViTForImageClassification"),
        ("T5Model", ENCODER, "T5ForConditionalGeneration"),
        ("T5EncoderModel", TOKENS, "T5ForTokenClassification"),
    ],
)
def test_architectures_are_classes_of_transformers(
    architecture: str, task: str, wanted: str
) -> None:
    import transformers

    assert architecture_for({"architectures": [architecture]}, get_task(task)) == wanted
    if wanted != "BertForCausalLM":  # transformers calls that one BertLMHeadModel
        assert hasattr(transformers, wanted)


@pytest.mark.parametrize("task", TASKS)
def test_classes_that_load_a_task_are_there(task: str) -> None:
    import transformers

    whole = {"architectures": ["T5ForConditionalGeneration"]}
    assert hasattr(transformers, auto_class_for(whole, get_task(task)))


def test_an_encoder_saved_alone_is_loaded_alone() -> None:
    import transformers

    alone = {"architectures": ["T5EncoderModel"]}
    assert auto_class_for(alone, get_task(ENCODER)) == "AutoModelForTextEncoding"
    assert auto_class_for(alone, get_task(FEATURES)) == "AutoModel"
    assert hasattr(transformers, "AutoModelForTextEncoding")


@pytest.mark.parametrize("named", [None, [], 5, "BertModel", [None]])
def test_no_architecture(named: object) -> None:
    assert architecture_for({"architectures": named}, get_task(CLASSES)) is None


@pytest.mark.parametrize(
    ("shapes", "labels"),
    [
        ({"classifier.weight": (3, 8), "classifier.bias": (3,)}, 3),
        ({"score.weight": (2, 8)}, 2),
        ({"classifier.dense.weight": (8, 8), "classifier.out_proj.weight": (5, 8)}, 5),
        ({"model.classifier.weight": (4, 8)}, 4),
        ({"encoder.reclassifier.weight": (4, 8)}, None),
        ({"classifier.weight": (4,)}, None),
        ({"bert.encoder.bias": (8,)}, None),
        ({}, None),
    ],
)
def test_labels_of_heads(shapes: dict[str, tuple[int, ...]], labels: int | None) -> None:
    assert head_labels(shapes) == labels
