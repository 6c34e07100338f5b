"""Models as torch modules, and the inputs they are traced with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import logging as tf_logging

from fourierft_export.errors import BadInputError, BaseMismatchError, UsageError
from fourierft_export.models.example_inputs import example_inputs, input_names
from fourierft_export.models.load import load_model, quiet_transformers

FEATURES, CLASSES, CAUSAL = "feature-extraction", "text-classification", "text-generation"
HEAD = ("classifier.weight", "classifier.bias")


def test_a_causal_model_loads_and_runs(stories260k: Path) -> None:
    model = load_model(stories260k, CAUSAL)
    assert not model.training
    inputs = example_inputs(model, batch=3, length=8)
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert {tuple(v.shape) for v in inputs.values()} == {(3, 8)}
    assert {v.dtype for v in inputs.values()} == {torch.int64}
    assert inputs["attention_mask"].sum().item() == 3 * 8 - 2
    assert inputs["input_ids"].max() < 512
    assert model(**inputs).logits.shape == (3, 8, 512)
    again = example_inputs(model, batch=3, length=8)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_file_in_the_given_dtype(dtype: str, stories260k: Path) -> None:
    stored = load_file(stories260k / "model.safetensors")
    state = load_model(stories260k, CAUSAL, dtype=dtype).state_dict()
    wanted = getattr(torch, dtype)
    assert all(torch.equal(state[name], tensor.to(wanted)) for name, tensor in stored.items())
    assert all(state[name].dtype == wanted for name in stored)


def test_a_head_that_nobody_provides_is_an_error(minilm_dir: Path) -> None:
    """Transformers would make it up at random and only print so."""
    with pytest.raises(BaseMismatchError, match="2 missing") as caught:
        load_model(minilm_dir, CLASSES, num_labels=3)
    assert sorted(caught.value.offenders) == sorted(HEAD)
    model = load_model(minilm_dir, CLASSES, num_labels=3, provided=HEAD)
    assert model.get_parameter("classifier.weight").shape == (3, 384)
    inputs = example_inputs(model)
    assert list(inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert model(**inputs).logits.shape == (2, 3)


def test_inputs_that_do_not_count_are_left_out(tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model("roberta-cls")
    model.config.type_vocab_size = 1
    assert input_names(model) == ["input_ids", "attention_mask"]
    inputs = example_inputs(model, length=8)
    assert inputs["input_ids"][-1, -2:].tolist() == [model.config.pad_token_id] * 2


def test_missing_and_misshapen_weights_are_errors(stories260k: Path, tmp_path: Path) -> None:
    shutil.copytree(stories260k, tmp_path / "base")
    tensors = load_file(stories260k / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="1 missing and 1 of another shape") as caught:
        load_model(tmp_path / "base", CAUSAL)
    assert caught.value.offenders == (
        "model.layers.2.self_attn.q_proj.weight",
        "model.norm.weight",
    )


def test_directories_that_transformers_cannot_load(stories260k: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="a model that transformers loads for text-generation"):
        load_model(tmp_path, CAUSAL)
    shutil.copytree(stories260k, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(BadInputError, match="a model that transformers loads"):
        load_model(tmp_path / "cut", CAUSAL)
    with pytest.raises(UsageError, match="task"):
        load_model(stories260k, "translation")


def test_no_network_and_no_noise(capsys: pytest.CaptureFixture[str], minilm_dir: Path) -> None:
    level = tf_logging.get_verbosity()
    load_model(minilm_dir, CLASSES, provided=HEAD)
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""
    assert tf_logging.get_verbosity() == level
    with pytest.raises(ZeroDivisionError), quiet_transformers():
        _ = 1 / 0
    assert tf_logging.get_verbosity() == level
