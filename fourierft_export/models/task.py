"""The tasks of models, and how a config or an adapter's task type names them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInputError, UsageError
from ..files import strict_json
from ..files.safetensors_reader import read_file


@dataclass(frozen=True)
class Task:
    """One kind of model.

    Attributes:
        name: as transformers' pipelines call it; "seq2seq-encoder" has no pipeline.
        architecture: what follows the family's name in the name of such a class.
        outputs: names of the outputs to export, in order, if the model has them.
        peft_type: PEFT's TaskType; None where PEFT has none.
        labelled: its head has one output for each label in the config.
        auto_class: the transformers class that loads such a model; "" for "AutoModel" followed by
            the architecture.
        encoder_only: only the model's encoder is run.
    """

    name: str
    architecture: str
    outputs: tuple[str, ...] = ("logits",)
    peft_type: str | None = None
    labelled: bool = False
    auto_class: str = ""
    encoder_only: bool = False


_ENCODED = ("last_hidden_state", "pooler_output")
_ANSWER = ("start_logits", "end_logits")
_TASKS = (
    Task("feature-extraction", "Model", _ENCODED, "FEATURE_EXTRACTION", auto_class="AutoModel"),
    Task("text-classification", "ForSequenceClassification", peft_type="SEQ_CLS", labelled=True),
    Task("text-generation", "ForCausalLM", peft_type="CAUSAL_LM"),
    Task("token-classification", "ForTokenClassification", peft_type="TOKEN_CLS", labelled=True),
    Task("question-answering", "ForQuestionAnswering", _ANSWER, "QUESTION_ANS"),
    Task("image-classification", "ForImageClassification", labelled=True),
    Task(
        "seq2seq-encoder",
        "ForConditionalGeneration",
        ("last_hidden_state",),
        "SEQ_2_SEQ_LM",
        auto_class="AutoModelForSeq2SeqLM",
        encoder_only=True,
    ),
)
TASKS = tuple(task.name for task in _TASKS)
"""The names of all tasks."""
MAX_CONFIG_BYTES = 64 << 20
MAX_LAYERS = 1_000
MAX_LABELS = 1_000_000
_LAYERS = ("layers", "layer", "depth", "depths", "blocks")
_FLAGS = ("output_hidden_states", "output_attentions")
# Names of earlier versions -> today's.
ALIASES = {"sequence-classification": "text-classification", "causal-lm": "text-generation"}
_BY_NAME = {task.name: task for task in _TASKS}
_BY_PEFT_TYPE = {task.peft_type: task for task in _TASKS if task.peft_type is not None}
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
_FAMILY_ENDINGS = ("LMHeadModel", "DoubleHeadsModel", "PreTrainedModel", "EncoderModel", "Model")
# Parts of the names of heads, which adapters save whole.
HEAD_PARTS = frozenset({"classifier", "classification_head", "score", "pooler", "pre_classifier"})
# The last projection of the heads that transformers builds, most specific first.
_HEAD_WEIGHTS = (
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "classifier.dense2.weight",
    "classifier.weight",
    "score.weight",
)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the config.json of a model directory; {} if there is none."""
    path = Path(directory) / "config.json"
    if not os.path.lexists(path):
        return {}
    config = strict_json.loads(read_file(path, MAX_CONFIG_BYTES), os.fspath(path))
    if not isinstance(config, dict):
        raise BadInputError(path, expected="a JSON object", found=type(config).__name__)
    _check_fields(path, config)
    return config


def _check_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuses counts that would take hours to build, and flags as text; in nested fields, too."""
    for name, value in fields.items():
        most = MAX_LAYERS if name.endswith(_LAYERS) else math.inf
        most = MAX_LABELS if name == "num_labels" else most
        for count in value if isinstance(value, list) else (value,):
            if isinstance(count, dict):
                _check_fields(path, count)
            elif isinstance(count, int) and count > most:
                raise BadInputError(path, expected=f"{name} of at most {most}", found=str(count))
            elif isinstance(count, str) and name in _FLAGS:
                raise BadInputError(path, expected=f"{name} true or false", found=repr(count))


def get_task(name: str) -> Task:
    """Returns the task with this name or alias."""
    name = ALIASES.get(name, name)
    if name not in _BY_NAME:
        raise UsageError("task", expected=" or ".join(TASKS), found=repr(name))
    return _BY_NAME[name]


def choose_task(name: str | None, config: Mapping[str, Any], task_type: str | None) -> Task:
    """Returns the task of this name, or infers it; an error if neither is possible."""
    task = likely_task(config, task_type) if name is None else get_task(name)
    if task is None:
        raise UsageError(
            "task",
            expected=f"an adapter task type or a base architecture for one of: {', '.join(TASKS)}",
            found=f"task type {task_type}, architecture {architecture_of(config)}",
            remedy="name the task with --task (task=...)",
        )
    return task


def likely_task(config: Mapping[str, Any], task_type: str | None) -> Task | None:
    """Infers the task of a base with an adapter; None if neither of them says it.

    Args:
        config: the base's config.json.
        task_type: PEFT's task_type of the adapter. It counts first: only it says that a bare
            encoder has become a classifier.
    """
    architecture = architecture_of(config) or ""
    if architecture.endswith("ForMultipleChoice"):  # PEFT calls it a classification of sequences
        return None
    if task_type in _BY_PEFT_TYPE:
        return _BY_PEFT_TYPE[task_type]
    if architecture.endswith(_CAUSAL_ENDINGS):
        return _BY_NAME["text-generation"]
    if architecture.endswith("EncoderModel"):
        return _BY_NAME["seq2seq-encoder"]
    return next((task for task in _TASKS if architecture.endswith(task.architecture)), None)


def auto_class_for(config: Mapping[str, Any], task: Task) -> str:
    """Names the transformers class that loads a model with this config for `task`."""
    # Only the encoder of a sequence-to-sequence model was saved.
    if task.encoder_only and (architecture_of(config) or "").endswith("EncoderModel"):
        return "AutoModelForTextEncoding"
    return task.auto_class or f"AutoModel{task.architecture}"


def architecture_for(config: Mapping[str, Any], task: Task) -> str | None:
    """Names the class of the base's family for `task`, such as BertForSequenceClassification."""
    architecture = architecture_of(config)
    if architecture is None:
        return None
    if task.name == "text-generation" and architecture.endswith(_CAUSAL_ENDINGS):
        return architecture
    for ending in _FAMILY_ENDINGS:
        architecture = architecture.removesuffix(ending)
    return architecture.split("For")[0] + task.architecture


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Returns the first architecture in a config, or None."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else None


def head_labels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Counts the labels of the head among an adapter's saved tensors (name -> shape)."""
    weight = head_weight(shapes)
    return None if weight is None else shapes[weight][0]


def head_weight(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Finds the name of the head's last weight among saved tensors (name -> shape)."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    found = (n for end in _HEAD_WEIGHTS for n in matrices if f".{n}".endswith(f".{end}"))
    return next(found, None)
