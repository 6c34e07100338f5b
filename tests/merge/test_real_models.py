"""Merging PEFT's adapters into real models, against PEFT and against float64."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.peft import from_peft
from fourierft_export.merge.merge import merge_checkpoint

Array = np.ndarray[Any, Any]


def load_classifier(path: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    return model.eval(), info


def load_causal(path: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    return model.eval(), info


def logits(model: Any, **inputs: Any) -> Array:
    with torch.no_grad():
        return model(**inputs).logits.double().numpy()


def in_bfloat16(base: Path, target: Path) -> Path:
    """The same checkpoint with its floats rounded to bfloat16."""
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("1_Pooling"))
    tensors = load_file(base / "model.safetensors")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(half, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_bare_encoder_becomes_the_classifier_that_peft_trained(
    minilm_dir: Path,
    peft_minilm_adapter: Callable[..., Path],
    load_peft_minilm: Callable[[Path], Any],
    tokenize: Callable[..., dict[str, Any]],
    sst2_sentences: list[str],
    tmp_path: Path,
    num_labels: int,
) -> None:
    adapter = peft_minilm_adapter(num_labels=num_labels)
    bundle = from_peft(adapter, minilm_dir)
    report = merge_checkpoint(minilm_dir, bundle, tmp_path / "out")
    model, info = load_classifier(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.num_labels == num_labels
    assert model.classifier.weight.shape == (num_labels, 384)

    reference = load_peft_minilm(adapter)
    inputs = tokenize(sst2_sentences[:16])
    unmerged = logits(reference, **inputs)
    found = logits(model, **inputs)
    np.testing.assert_allclose(found, unmerged, rtol=0, atol=1e-5 * np.abs(unmerged).max())
    with reference.disable_adapter():
        assert np.abs(logits(reference, **inputs) - unmerged).max() > 1e-2

    expected = reference.merge_and_unload().state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) - {"bert.embeddings.position_ids"} == set(expected)
    for name, value in expected.items():
        assert (stored[name] - value).abs().max() <= 1e-6, name
    assert report.added == ("classifier.bias", "classifier.weight")
    assert {layer.name for layer in report.layers} == {layer.name for layer in bundle.layers}
    assert len(report.layers) == 12
    assert all(layer.survival is not None and layer.survival > 0.99 for layer in report.layers)
    assert report.bundles[0].base_check == "same"
    assert report.notes == ()


def test_minilm_merged_twice_gives_the_same_bytes_everywhere(
    minilm_dir: Path, peft_minilm_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = from_peft(peft_minilm_adapter(), minilm_dir)
    for name in ("a", "b"):
        merge_checkpoint(minilm_dir, [bundle], tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*"))
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*"))
    for file in files:
        if (tmp_path / "a" / file).is_file():
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_full_classifier_as_base_gives_the_same_weights(
    minilm_dir: Path,
    peft_minilm_adapter: Callable[..., Path],
    tensors_of: Callable[[Path], dict[str, Array]],
    tmp_path: Path,
) -> None:
    """A base with `bert.` prefix and a head of its own: the adapter's head replaces it."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_dir, num_labels=2)
    model.save_pretrained(tmp_path / "full")
    bundle = from_peft(peft_minilm_adapter(), minilm_dir)
    merge_checkpoint(minilm_dir, bundle, tmp_path / "from_bare")
    report = merge_checkpoint(tmp_path / "full", bundle, tmp_path / "from_full")
    bare, full = tensors_of(tmp_path / "from_bare"), tensors_of(tmp_path / "from_full")
    assert set(full) == set(bare) - {"bert.embeddings.position_ids"}
    for name, value in full.items():
        assert value.tobytes() == bare[name].tobytes(), name
    assert report.replaced == ("classifier.bias", "classifier.weight")
    assert report.added == ()
    own = tensors_of(tmp_path / "full")["classifier.weight"]
    assert not np.array_equal(full["classifier.weight"], own)


def test_labels_can_be_named(
    minilm_dir: Path, peft_minilm_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = from_peft(peft_minilm_adapter(), minilm_dir)
    merge_checkpoint(minilm_dir, bundle, tmp_path / "out", labels=["bad", "good"])
    model, _ = load_classifier(tmp_path / "out")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.label2id == {"bad": 0, "good": 1}


def test_bfloat16_is_closer_to_the_truth_than_peft(
    minilm_dir: Path,
    trained_minilm_adapter: Path,
    exact_delta: Callable[[Bundle, str], Array],
    tensors_of: Callable[[Path], dict[str, Array]],
    tmp_path: Path,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = in_bfloat16(minilm_dir, tmp_path / "bf16")
    bundle = from_peft(trained_minilm_adapter, minilm_dir)
    report = merge_checkpoint(base, bundle, tmp_path / "out")
    assert report.bundles[0].base_check == "precision"
    assert any("another precision" in note for note in report.notes)

    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, trained_minilm_adapter).merge_and_unload()
    peft = merged.state_dict()
    ours, before = tensors_of(tmp_path / "out"), tensors_of(base)
    our_error = peft_error = 0.0
    for layer in report.layers:
        weight = before[layer.tensor.removeprefix("bert.")]
        delta = exact_delta(bundle, layer.name)
        exact = weight.astype(np.float64) + delta
        value = ours[layer.tensor]
        assert value.dtype == ml_dtypes.bfloat16
        error = np.abs(value.astype(np.float64) - exact)
        our_error += np.square(error).sum()
        theirs = peft[layer.tensor].double().numpy()
        peft_error += np.square(theirs - exact).sum()
        # Half a unit in the last place of the exact value, plus 1e-6 of the largest change.
        _, exponent = np.frexp(exact)
        half_ulp = np.ldexp(0.5, exponent - 8)
        assert (error <= half_ulp + 1e-6 * np.abs(delta).max()).all(), layer.name
    assert our_error < peft_error


def test_trained_minilm_in_float16_and_float32_is_rounded_once(
    minilm_dir: Path,
    trained_minilm_adapter: Path,
    exact_delta: Callable[[Bundle, str], Array],
    tensors_of: Callable[[Path], dict[str, Array]],
    tmp_path: Path,
) -> None:
    bundle = from_peft(trained_minilm_adapter, minilm_dir)
    before = tensors_of(minilm_dir)
    for dtype, mantissa in (("float32", 24), ("float16", 11)):
        report = merge_checkpoint(minilm_dir, bundle, tmp_path / dtype, dtype=dtype)
        after = tensors_of(tmp_path / dtype)
        assert {v.dtype.name for k, v in after.items() if "position_ids" not in k} == {dtype}
        assert after["bert.embeddings.position_ids"].dtype == np.int64
        for layer in report.layers:
            delta = exact_delta(bundle, layer.name)
            exact = before[layer.tensor.removeprefix("bert.")].astype(np.float64) + delta
            _, exponent = np.frexp(exact)
            smallest = -14 if dtype == "float16" else -126
            half_ulp = np.ldexp(0.5, np.maximum(exponent - 1, smallest) + 1 - mantissa)
            error = np.abs(after[layer.tensor].astype(np.float64) - exact)
            assert (error <= half_ulp + 1e-6 * np.abs(delta).max()).all(), (dtype, layer.name)
        model, info = load_classifier(tmp_path / dtype)
        assert not info["missing_keys"]
        assert model.dtype == getattr(torch, dtype)


def test_stories_q_and_v_equal_peft(
    stories260k: Path,
    peft_causal: Callable[..., Path],
    load_peft_causal: Callable[[Path, Path], Any],
    stories_tokens: Array,
    tmp_path: Path,
) -> None:
    adapter = peft_causal(stories260k, target_modules=["q_proj", "v_proj"])
    report = merge_checkpoint(stories260k, from_peft(adapter, stories260k), tmp_path / "out")
    model, info = load_causal(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    reference = load_peft_causal(stories260k, adapter)
    tokens = torch.from_numpy(stories_tokens)
    expected = logits(reference, input_ids=tokens)
    scale = np.abs(expected).max()
    found = logits(model, input_ids=tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    with reference.disable_adapter():
        assert np.abs(logits(reference, input_ids=tokens) - expected).max() > 1e-3 * scale
    merged = reference.merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert (value - merged[name]).abs().max() <= 1e-6, name
    assert model.config.tie_word_embeddings
    assert len(report.layers) == 10


def test_a_tied_lm_head_is_untied_and_equals_pefts_unmerged_model(
    stories260k: Path,
    peft_causal: Callable[..., Path],
    load_peft_causal: Callable[[Path, Path], Any],
    stories_tokens: Array,
    tensors_of: Callable[[Path], dict[str, Array]],
    tmp_path: Path,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that merging would change the embeddings
        adapter = peft_causal(stories260k, target_modules=["q_proj", "lm_head"], scaling=60.0)
        reference = load_peft_causal(stories260k, adapter)
    bundle = from_peft(adapter, stories260k)
    report = merge_checkpoint(stories260k, bundle, tmp_path / "out")
    model, info = load_causal(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.from_numpy(stories_tokens)
    expected = logits(reference, input_ids=tokens)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(model, input_ids=tokens), expected, rtol=0, atol=1e-5 * scale)
    with reference.disable_adapter():
        assert np.abs(logits(reference, input_ids=tokens) - expected).max() > 1e-3 * scale
    before, after = tensors_of(stories260k), tensors_of(tmp_path / "out")
    embedding = "model.embed_tokens.weight"
    assert after[embedding].tobytes() == before[embedding].tobytes()
    assert not np.array_equal(after["lm_head.weight"], after[embedding])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert report.added == ("lm_head.weight",)
    assert any("tied" in note for note in report.notes)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"]])
def test_a_tied_embedding_that_was_trained_whole_is_untied(
    stories260k: Path,
    peft_causal: Callable[..., Path],
    stories_tokens: Array,
    tmp_path: Path,
    modules: list[str],
) -> None:
    """Both sides of a tie are known to the adapter apart: only the trained one may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the model has tied weights
        adapter = peft_causal(stories260k, target_modules=["q_proj"], modules_to_save=modules)
    bundle = from_peft(adapter, stories260k)
    name = next(iter(bundle.saved))
    changed = Bundle.build(bundle.spec, bundle.spectra, {name: bundle.saved[name] * np.float32(2)})
    merge_checkpoint(stories260k, changed, tmp_path / "out")
    model, _ = load_causal(tmp_path / "out")
    original, _ = load_causal(stories260k)
    factor = {"lm_head": (2, 1), "embed_tokens": (1, 2)}[modules[0]]
    embedding = original.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding * factor[0])
    assert torch.equal(model.model.embed_tokens.weight, embedding * factor[1])


def test_gpt2_conv1d_equals_peft(
    tiny_gpt2: Path,
    peft_causal: Callable[..., Path],
    load_peft_causal: Callable[[Path, Path], Any],
    tmp_path: Path,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells that it sets fan_in_fan_out for Conv1D
        adapter = peft_causal(tiny_gpt2, target_modules=["c_attn", "mlp.c_proj"])
        reference = load_peft_causal(tiny_gpt2, adapter)
    report = merge_checkpoint(tiny_gpt2, from_peft(adapter, tiny_gpt2), tmp_path / "out")
    model, info = load_causal(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = logits(reference, input_ids=tokens)
    with reference.disable_adapter():
        assert np.abs(logits(reference, input_ids=tokens) - expected).max() > 1e-3
    np.testing.assert_allclose(logits(model, input_ids=tokens), expected, rtol=0, atol=1e-5)
    merged = reference.merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert (value - merged[name]).abs().max() <= 1e-6, name
    assert {layer.shape for layer in report.layers} == {(32, 96), (128, 32)}


def test_biases_that_were_trained_replace_the_bases(
    minilm_dir: Path,
    peft_minilm_adapter: Callable[..., Path],
    tensors_of: Callable[[Path], dict[str, Array]],
    tmp_path: Path,
) -> None:
    bundle = from_peft(peft_minilm_adapter(bias="fourier_only", num_labels=2), minilm_dir)
    biases = {name for name in bundle.saved if name.endswith("query.bias")}
    assert len(biases) == 6
    saved = {k: v + np.float32(1) if k in biases else v for k, v in bundle.saved.items()}
    merge_checkpoint(minilm_dir, Bundle.build(bundle.spec, bundle.spectra, saved), tmp_path / "out")
    before, after = tensors_of(minilm_dir), tensors_of(tmp_path / "out")
    for name in biases:
        expected = before[name.removeprefix("bert.")] + np.float32(1)
        np.testing.assert_array_equal(after[name], expected)
    assert load_classifier(tmp_path / "out")[1]["missing_keys"] == set()


def test_what_survives_in_bfloat16_is_what_the_readme_says(
    minilm_dir: Path,
    peft_minilm_adapter: Callable[..., Path],
    trained_minilm_adapter: Path,
    tmp_path: Path,
) -> None:
    cases = [
        (peft_minilm_adapter(), 1.0, (0.99, 1.0), (0.003, 0.0085)),
        (peft_minilm_adapter(), 0.1, (0.92, 0.975), (0.025, 0.075)),
        (peft_minilm_adapter(), 0.01, (0.5, 0.75), (0.28, 0.72)),
        (trained_minilm_adapter, 1.0, (0.99, 1.0), (0.003, 0.0095)),
    ]
    for number, (adapter, weight, survival, error) in enumerate(cases):
        bundle, out = from_peft(adapter, minilm_dir), tmp_path / str(number)
        report = merge_checkpoint(minilm_dir, bundle, out, dtype="bfloat16", weights=[weight])
        assert len(report.layers) == 12
        for layer in report.layers:
            assert layer.survival is not None and survival[0] < layer.survival < survival[1]
            assert layer.error is not None and error[0] < layer.error < error[1]
