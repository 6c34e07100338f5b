"""What a model is for, read from its config and from the adapter's task type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True)
class Task:
    """One kind of model.

    Attributes:
        name: as transformers' pipelines call it, where they have it.
        auto_class: the transformers class that loads such a model.
        architecture: the ending that such a class's name has after its family's name.
        outputs: names of the outputs that matter, in order; those that a model lacks are left out.
        peft_type: PEFT's TaskType; None where PEFT has none.
        token_outputs: whether the outputs have a sequence axis.
        labelled: its head decides between the labels that the config names.
        encoder_only: of the model, only the encoder is run.
    """

    name: str
    auto_class: str
    architecture: str
    outputs: tuple[str, ...]
    peft_type: str | None
    token_outputs: bool
    labelled: bool = False
    encoder_only: bool = False


_ALL = (
    Task(
        "feature-extraction",
        "AutoModel",
        "Model",
        ("last_hidden_state", "pooler_output"),
        "FEATURE_EXTRACTION",
        token_outputs=True,
    ),
    Task(
        "sequence-classification",
        "AutoModelForSequenceClassification",
        "ForSequenceClassification",
        ("logits",),
        "SEQ_CLS",
        token_outputs=False,
        labelled=True,
    ),
    Task(
        "causal-lm",
        "AutoModelForCausalLM",
        "ForCausalLM",
        ("logits",),
        "CAUSAL_LM",
        token_outputs=True,
    ),
    Task(
        "token-classification",
        "AutoModelForTokenClassification",
        "ForTokenClassification",
        ("logits",),
        "TOKEN_CLS",
        token_outputs=True,
        labelled=True,
    ),
    Task(
        "question-answering",
        "AutoModelForQuestionAnswering",
        "ForQuestionAnswering",
        ("start_logits", "end_logits"),
        "QUESTION_ANS",
        token_outputs=True,
    ),
    Task(
        "image-classification",
        "AutoModelForImageClassification",
        "ForImageClassification",
        ("logits",),
        None,
        token_outputs=False,
        labelled=True,
    ),
    Task(
        "seq2seq-encoder",
        "AutoModelForSeq2SeqLM",
        "ForConditionalGeneration",
        ("last_hidden_state",),
        "SEQ_2_SEQ_LM",
        token_outputs=True,
        encoder_only=True,
    ),
)
BY_NAME = {task.name: task for task in _ALL}
TASKS = tuple(BY_NAME)
BY_PEFT_TYPE = {task.peft_type: task for task in _ALL if task.peft_type is not None}
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        UsageError: no such task.
    """
    if name not in BY_NAME:
        raise UsageError("task", expected=" or ".join(TASKS), found=repr(name))
    return BY_NAME[name]


def infer_task(config: Mapping[str, Any], task_type: str | None) -> str:
    """The task of a model that carries an adapter.

    The adapter's word counts first: its head may be the only sign that an encoder has become a
    classifier. Without one, the architecture decides.

    Args:
        config: the base's config.json.
        task_type: PEFT's task_type of the adapter, or None.

    Raises:
        UsageError: neither tells; the remedy names the option.
    """
    task = likely_task(config, task_type)
    if task is None:
        raise UsageError(
            "task",
            expected=f"an adapter task type or a base architecture for one of: {', '.join(TASKS)}",
            found=f"task type {task_type}, architecture {_architecture(config)}",
            remedy="name the task with --task (task=...)",
        )
    return task.name


def likely_task(config: Mapping[str, Any], task_type: str | None) -> Task | None:
    """As `infer_task`, but None where neither the adapter nor the architecture tells."""
    if task_type in BY_PEFT_TYPE:
        return BY_PEFT_TYPE[task_type]
    architecture = _architecture(config)
    if architecture is None:
        return None
    if architecture.endswith(_CAUSAL_ENDINGS):
        return BY_NAME["causal-lm"]
    if architecture.endswith("EncoderModel"):
        return BY_NAME["seq2seq-encoder"]
    return next((task for task in _ALL if architecture.endswith(task.architecture)), None)


def auto_class_for(config: Mapping[str, Any], task: Task) -> str:
    """The transformers class that loads a model of this config for `task`.

    It is the task's own, but for a sequence-to-sequence model of which only the encoder was saved.
    """
    if task.encoder_only and (_architecture(config) or "").endswith("EncoderModel"):
        return "AutoModelForTextEncoding"
    return task.auto_class


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The first class that the config names, if it names any."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else None


def architecture_for(config: Mapping[str, Any], task: Task) -> str | None:
    """The class name of the base's family for `task`, such as BertForSequenceClassification.

    Returns:
        None when the config names no architecture.
    """
    architecture = _architecture(config)
    if architecture is None:
        return None
    if task.name == "causal-lm" and architecture.endswith(_CAUSAL_ENDINGS):
        return architecture
    family = architecture
    for ending in ("LMHeadModel", "DoubleHeadsModel", "PreTrainedModel", "EncoderModel", "Model"):
        family = family.removesuffix(ending)
    family = family.split("For")[0]
    return family + task.architecture
