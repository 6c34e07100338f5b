"""What validate refuses to do, and with which error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourierft_export as ff
from fourierft_export.errors import (
    BadInputError,
    BaseMismatchError,
    FileAccessError,
    MissingExtraError,
    UsageError,
    ValidationError,
)


def test_what_does_not_fit_the_base_is_a_mismatch(classifier: Any, tiny_gpt2: Path) -> None:
    bundle = classifier.bundle
    with pytest.raises(BaseMismatchError) as caught:
        ff.validate(base=tiny_gpt2, bundle=bundle, merged=tiny_gpt2, task="causal-lm")
    assert len(caught.value.offenders) == len(bundle.layers)
    headless = ff.Bundle.build(bundle.spec, bundle.spectra)
    with pytest.raises(UsageError, match=r"neither has classifier\.bias, classifier\.weight"):
        ff.validate(base=classifier.base, bundle=headless, merged=classifier.base)


def test_calls_that_prove_nothing_are_refused(classifier: Any, clean_onnx: Path) -> None:
    for call in (
        {},
        {"base": classifier.base},
        {"onnx": clean_onnx},
        {"bundle": classifier.bundle, "onnx": clean_onnx},
        {"peft": classifier.adapter, "onnx": clean_onnx},
        {"base": classifier.base, "bundle": classifier.bundle, "sides": {"torch": dict}},
        {"base": classifier.base, "bundle": classifier.bundle, "task": "poetry"},
    ):
        with pytest.raises(UsageError):
            ff.validate(**call)


def test_a_number_of_sentences_with_inputs_of_ones_own_is_refused(
    classifier: Any, tmp_path: Path, run_verb: Callable[..., Any]
) -> None:
    classifier.bundle.save(tmp_path / "a.fourierft.safetensors")
    np.savez(tmp_path / "in.npz", input_ids=np.ones((2, 3), np.int64))
    words = ["validate", "--base", classifier.base, "--inputs", tmp_path / "in.npz"]
    words += ["--bundle", tmp_path / "a.fourierft.safetensors"]
    refused = run_verb(*words, "--samples", 4)
    assert refused.code == 2 and "inputs of your own" in refused.err
    assert run_verb(*words).code == 0


def test_paths_are_checked_before_anything_runs(
    classifier: Any, clean_onnx: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.onnx").write_text("not a graph at all")
    (tmp_path / "empty").mkdir()
    shutil.copytree(classifier.base, tmp_path / "escaping")
    weights = tmp_path / "escaping" / "model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"pooler.dense.bias": "../outside.safetensors"}}
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    base, absent = classifier.base, tmp_path / "absent"
    for call, error in (
        ({"base": absent, "merged": base}, FileAccessError),
        ({"base": base, "merged": absent}, FileAccessError),
        ({"base": base, "merged": tmp_path / "empty"}, BadInputError),
        ({"base": base, "peft": tmp_path / "empty"}, BadInputError),
        ({"base": base, "onnx": absent}, FileAccessError),
        ({"base": base, "onnx": tmp_path / "text.onnx"}, BadInputError),
        ({"base": base, "bundle": absent}, FileAccessError),
        ({"base": base, "onnx": clean_onnx, "inputs": absent}, FileAccessError),
        ({"base": base, "onnx": clean_onnx, "inputs": {"pixels": np.ones((2, 3))}}, UsageError),
        ({"base": base, "merged": base, "inputs": {"pixels": np.ones((2, 3))}}, UsageError),
        ({"base": base, "merged": base, "inputs": {"input_ids": [[10**6]]}}, BadInputError),
        ({"base": base, "merged": base, "inputs": {"input_ids": ["words"]}}, BadInputError),
        ({"base": base, "merged": tmp_path / "escaping"}, BadInputError),
    ):
        with pytest.raises(error):
            ff.validate(**call)


def test_without_peft_the_error_names_the_extra(
    classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"fourierft-export\[peft\]"):
        ff.validate(base=classifier.base, bundle=classifier.bundle, peft=classifier.adapter)


def test_a_peft_adapter_that_lacks_a_spectrum_is_a_problem(classifier: Any, tmp_path: Path) -> None:
    """PEFT fills it with random numbers and only warns."""
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    shutil.copytree(classifier.adapter, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.bert.encoder.layer.1.attention.self.query.fourierft_spectrum"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    report = ff.validate(base=classifier.base, bundle=classifier.bundle, peft=adapter)
    with pytest.raises(ValidationError, match=r"missing adapter keys.*layer\.1"):
        report.raise_for_failure()
    assert [(p.left, p.right) for p in report.comparisons if not p.ok] == [("torch", "peft")]


def test_other_adapters_of_peft_are_refused_by_type(classifier: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(classifier.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(BadInputError, match="found type LORA"):
        ff.validate(base=classifier.base, peft=adapter, bundle=classifier.bundle)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadInputError, match=r"adapter_model\.safetensors, found no such file"):
        ff.validate(base=classifier.base, peft=adapter, bundle=classifier.bundle)


def test_another_base_of_the_same_shape_is_a_mismatch(
    classifier: Any, plant: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import BertModel

    other = BertModel.from_pretrained(classifier.base)
    other.encoder.layer[1].attention.self.value.weight.data *= 1.5
    other.save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError) as caught:
        ff.validate(base=tmp_path, bundle=classifier.bundle, merged=plant())
    assert [line.split(":")[0] for line in caught.value.offenders] == [
        "bert.encoder.layer.1.attention.self.value"
    ]
