"""Tasks and architectures from configs, labels from heads."""

from __future__ import annotations

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
    ("architecture", "task_type", "task"),
    [
        ("BertModel", "SEQ_CLS", CLASSES),  # the head is only in the adapter
        ("LlamaForCausalLM", "SEQ_CLS", CLASSES),
        ("BertModel", "FEATURE_EXTRACTION", FEATURES),
        (None, "CAUSAL_LM", CAUSAL),
        ("BertModel", None, FEATURES),
        ("BertForSequenceClassification", None, CLASSES),
        ("LlamaForCausalLM", None, CAUSAL),
        ("GPT2LMHeadModel", None, CAUSAL),
        ("BertModel", "TOKEN_CLS", TOKENS),
        ("BertForTokenClassification", None, TOKENS),
        ("DistilBertForQuestionAnswering", None, ANSWERS),
        ("ViTForImageClassification", None, IMAGES),
        ("T5ForConditionalGeneration", None, ENCODER),
        ("T5EncoderModel", None, ENCODER),
        ("T5EncoderModel", "FEATURE_EXTRACTION", FEATURES),
    ],
)
def test_the_adapter_or_the_architecture_says_the_task(
    architecture: str | None, task_type: str | None, task: str
) -> None:
    assert choose_task(None, {"architectures": [architecture]}, task_type).name == task


@pytest.mark.parametrize("named", [None, [], 5, "BertModel", [5], {"a": 1}, ["BertForMaskedLM"]])
def test_what_does_not_say_it_is_an_error_that_names_the_option(named: object) -> None:
    with pytest.raises(UsageError, match="--task"):
        choose_task(None, {"architectures": named}, None)
    known = named == ["BertForMaskedLM"]
    wanted = "BertForSequenceClassification" if known else None
    assert architecture_for({"architectures": named}, get_task(CLASSES)) == wanted


def test_names_are_those_of_pipelines_and_old_ones_still_count() -> None:
    from transformers.pipelines import SUPPORTED_TASKS

    # transformers 5 has no pipeline for answers any more.
    assert set(TASKS) - set(SUPPORTED_TASKS) <= {ENCODER, ANSWERS}
    assert ALIASES == {"sequence-classification": CLASSES, "causal-lm": CAUSAL}
    for old, name in ALIASES.items():
        assert get_task(old).name == choose_task(old, {}, "TOKEN_CLS").name == name
    with pytest.raises(UsageError, match="found 'causal'"):
        get_task("causal")


@pytest.mark.parametrize(
    ("architecture", "task", "wanted"),
    [
        ("BertModel", CLASSES, "BertForSequenceClassification"),
        ("BertForMaskedLM", CLASSES, "BertForSequenceClassification"),
        ("BertForSequenceClassification", FEATURES, "BertModel"),
        ("BertLMHeadModel", CLASSES, "BertForSequenceClassification"),
        ("LlamaForCausalLM", CAUSAL, "LlamaForCausalLM"),
        ("LlamaForCausalLM", FEATURES, "LlamaModel"),
        ("GPT2LMHeadModel", CAUSAL, "GPT2LMHeadModel"),
        ("GPT2LMHeadModel", CLASSES, "GPT2ForSequenceClassification"),
        ("XLMRobertaModel", CLASSES, "XLMRobertaForSequenceClassification"),
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
    assert hasattr(transformers, wanted)


def test_classes_that_load_a_task_are_there() -> None:
    import transformers

    whole = {"architectures": ["T5ForConditionalGeneration"]}
    for task in TASKS:
        assert hasattr(transformers, auto_class_for(whole, get_task(task)))
    alone = {"architectures": ["T5EncoderModel"]}
    assert auto_class_for(alone, get_task(ENCODER)) == "AutoModelForTextEncoding"
    assert auto_class_for(alone, get_task(FEATURES)) == "AutoModel"


@pytest.mark.parametrize(
    ("shapes", "labels"),
    [
        ({"classifier.weight": (3, 8), "classifier.bias": (3,)}, 3),
        ({"score.weight": (2, 8)}, 2),
        ({"classifier.dense.weight": (8, 8), "classifier.out_proj.weight": (5, 8)}, 5),
        ({"model.classifier.weight": (4, 8)}, 4),
        ({"encoder.reclassifier.weight": (4, 8)}, None),
        ({"classifier.weight": (4,)}, None),
    ],
)
def test_labels_of_heads(shapes: dict[str, tuple[int, ...]], labels: int | None) -> None:
    assert head_labels(shapes) == labels
