"""One entry for every task: the same call gives the same task, and bad calls are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fourierft_export.adapt.attach import capture
from fourierft_export.adapt.config import FourierFTConfig
from fourierft_export.adapt.inject import inject
from fourierft_export.errors import (
    BadInputError,
    BaseMismatchError,
    FileAccessError,
    FourierFTError,
    UsageError,
)
from fourierft_export.train.data.loading import load_classifier, usual_targets
from fourierft_export.train.data.prepare import prepare
from fourierft_export.train.task import TrainingTask


@pytest.fixture
def sst2(data_dir: Path) -> Path:
    return data_dir / "text/sst2/train.tsv"


def loss_over(task: TrainingTask, rows: Any) -> float:
    with torch.no_grad():
        parts = [task.step(task.model, task.collate([row])) for row in rows]
    return sum(float(p.loss) for p in parts) / sum(p.count for p in parts)


def test_a_new_head_follows_the_seed_alone(minilm_dir: Path, sst2: Path) -> None:
    before = torch.random.get_rng_state()
    first = prepare("text-classification", model=minilm_dir, data=sst2, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again = prepare("text-classification", model=minilm_dir, data=sst2, seed=3)
    other = prepare("text-classification", model=minilm_dir, data=sst2, seed=4)
    a, b, c = (task.model.get_parameter("classifier.weight") for task in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert (first.train, first.eval) == (again.train, again.eval)
    assert first.eval is not None and first.eval != other.eval
    stored = load_file(minilm_dir / "model.safetensors")
    own = dict(first.model.named_parameters())
    assert all(
        torch.equal(own[f"bert.{k}"], v) for k, v in stored.items() if "position_ids" not in k
    )


def test_what_is_said_of_the_rows_and_the_head(minilm_dir: Path, sst2: Path) -> None:
    task = prepare("text-classification", model=minilm_dir, data=sst2, max_rows=50)
    assert task.eval is not None
    assert (len(task.train), len(task.eval)) == (50, 20)
    assert task.notes == (
        "no rows to score were given: 20 of 200 training rows are held out",
        "50 of 180 training rows are used",
        "new for 2 labels, and trained whole: classifier",
    )
    assert (task.metric, task.higher_is_better, task.task_type) == ("accuracy", True, "SEQ_CLS")
    assert (task.labels, task.modules_to_save) == (("0", "1"), ("classifier",))


def test_a_head_that_is_there_is_kept(minilm_dir: Path, sst2: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    names = {
        "id2label": {0: "bad", 1: "good", 2: "meh"},
        "label2id": {"bad": 0, "good": 1, "meh": 2},
    }
    model = AutoModelForSequenceClassification.from_pretrained(minilm_dir, **names)
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((minilm_dir / file).read_bytes())
    task = prepare("text-classification", model=tmp_path, data=sst2)
    assert torch.equal(task.model.get_parameter("classifier.weight"), model.classifier.weight)
    assert (task.labels, task.modules_to_save) == (("bad", "good", "meh"), ())
    rows = [{"text": f"{word} {i}", "label": word} for i in range(4) for word in ("good", "bad")]
    named = tmp_path / "named.jsonl"
    named.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = prepare("text-classification", model=tmp_path, data=named, eval_share=0)
    assert [row["labels"] for row in task.train] == [1, 0] * 4
    trec = sst2.parent.parent / "trec/train.tsv"
    task = prepare("text-classification", model=tmp_path, data=trec)
    assert task.model.get_parameter("classifier.weight").shape == (6, 384)
    assert task.modules_to_save == ("classifier",)


def test_more_than_a_head_may_not_be_missing(stories260k: Path, sst2: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(stories260k / "model.safetensors")
    lost = "model.layers.2.self_attn.q_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors")
    for file in ("config.json", "pieces.json"):
        (tmp_path / file).write_bytes((stories260k / file).read_bytes())
    with pytest.raises(BaseMismatchError) as caught:
        prepare("text-classification", model=tmp_path, data=sst2)
    assert caught.value.offenders == (lost,)
    with pytest.raises(BaseMismatchError):
        prepare("causal-lm", model=tmp_path, data=sst2)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "bert without a pooler": (tf.BertForMaskedLM, SIZES, ("bert.pooler", "classifier")),
    "roberta": (tf.RobertaModel, SIZES, ("classifier",)),
    "distilbert": (
        tf.DistilBertModel,
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
        ("pre_classifier", "classifier"),
    ),
    "deberta": (tf.DebertaV2Model, SIZES, ("pooler", "classifier")),
    "t5": (
        tf.T5ForConditionalGeneration,
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        ("classification_head",),
    ),
    "llama": (tf.LlamaForCausalLM, SIZES, ("score",)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_new_is_trained_and_saved(family: str, tmp_path: Path) -> None:
    """A layer drawn at random that the adapter does not carry would be lost."""
    model_class, sizes, wanted = FAMILIES[family]
    config = model_class.config_class(vocab_size=60, intermediate_size=16, **sizes)
    model_class(config).save_pretrained(tmp_path)
    kind = "text-classification"
    model, new = load_classifier(tmp_path, kind, ("a", "b", "c"), dtype="float32", seed=0)
    assert sorted(new) == sorted(wanted)
    again, _ = load_classifier(tmp_path, kind, ("a", "b", "c"), dtype="float32", seed=1)
    others = dict(again.named_parameters())
    # Biases and norms start at constants; weights that differ by the seed were drawn.
    drawn = {n for n, p in model.named_parameters() if not torch.equal(p, others[n])}
    assert drawn
    assert all(any(name.startswith(f"{path}.") for path in new) for name in drawn)
    config = FourierFTConfig(10, target_modules=usual_targets(model), modules_to_save=new)
    inject(model, config)
    assert drawn <= set(capture(model, "default").saved)


@pytest.mark.parametrize("task_name", ["text-classification", "causal-lm"])
def test_what_is_prepared_learns(
    task_name: str, minilm_dir: Path, stories260k: Path, data_dir: Path
) -> None:
    """A few steps on the spectra and the head lower the loss on the rows that they saw."""
    causal = task_name == "causal-lm"
    task = prepare(
        task_name,
        model=stories260k if causal else minilm_dir,
        data=data_dir / "text/subj/train.tsv",
        eval_share=0,
        max_length=24,
    )
    rows = task.train[:8]
    before = loss_over(task, rows)
    config = FourierFTConfig(
        n_frequency=200,
        init_weights=True,
        target_modules=task.target_modules,
        task_type=task.task_type,
        modules_to_save=task.modules_to_save or None,
    )
    inject(task.model, config)
    optimizer = torch.optim.Adam([p for p in task.model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        result = task.step(task.model, task.collate(rows))
        (result.loss / result.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_over(task, rows) < 0.98 * before


def test_the_model_can_be_half_as_large(minilm_dir: Path, sst2: Path) -> None:
    task = prepare("text-classification", model=minilm_dir, data=sst2, dtype="bfloat16")
    assert {p.dtype for p in task.model.parameters()} == {torch.bfloat16}


CALLS: dict[str, tuple[dict[str, Any], type[FourierFTError], str]] = {
    "no task": ({"task": None}, UsageError, "give --task"),
    "another task": ({"task": "summarise"}, UsageError, "text-classification or token-"),
    "no model": ({"model": None}, UsageError, "give --model"),
    "no data": ({"data": None}, UsageError, "give --data"),
    "a model that is not there": ({"model": "nowhere"}, FileAccessError, "nothing there"),
    "data that is not there": ({"data": "nowhere.tsv"}, FileAccessError, "nothing there"),
    "too long": ({"max_length": 513}, UsageError, "4 to 512 tokens, found 513"),
    "too short": ({"max_length": 3}, UsageError, "found 3"),
    "no such column": ({"text_columns": ("body",)}, UsageError, "found columns text, label"),
    "words for a text": ({"task": "token-classification"}, UsageError, "words: tokens or words"),
    "a second column for one text": (
        {"task": "causal-lm", "text_columns": ("text", "label")},
        UsageError,
        "at most 1, found 'text', 'label'",
    ),
    "three texts": ({"text_columns": ("a", "b", "c")}, UsageError, "at most 2"),
    "no rows": ({"max_rows": 0}, UsageError, "max_rows"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_cannot_be_carried_out(
    name: str, minilm_dir: Path, sst2: Path, tmp_path: Path
) -> None:
    # As jsonl, which every task reads with columns.
    rows = sst2.read_text("utf-8").splitlines()[1:]
    data = tmp_path / "a.jsonl"
    data.write_text(
        "".join(
            json.dumps(dict(zip(("text", "label"), r.split("\t"), strict=True))) + "\n"
            for r in rows
        )
    )
    options, kind, message = CALLS[name]
    asked = {"task": "text-classification", "model": minilm_dir, "data": data} | options
    with pytest.raises(kind, match=message) as caught:
        prepare(asked.pop("task"), **asked)
    assert type(caught.value) is kind


def test_bad_rows_of_text(minilm_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\nfine\t0\n \t1\nalso\t1\n\t0\n", "utf-8")
    with pytest.raises(BadInputError) as caught:
        prepare("text-classification", model=minilm_dir, data=path)
    assert caught.value.offenders == ("line 3: an empty text", "line 5: an empty text")
    path.write_text("text\tlabel\nfine\t0\nbad\tx\nalso\t1\n", "utf-8")
    with pytest.raises(BadInputError, match="line 3: label 'x'"):
        prepare("text-classification", model=minilm_dir, data=path)


def test_a_tokenizer_of_another_model_is_refused(
    minilm_dir: Path, stories260k: Path, sst2: Path, tmp_path: Path
) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((stories260k / file).read_bytes())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((minilm_dir / file).read_bytes())
    with pytest.raises(BadInputError, match="expected token ids below 512"):
        prepare("causal-lm", model=tmp_path, data=sst2)
