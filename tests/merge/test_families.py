"""Heads and prefixes of other model families: what PEFT trained is what transformers loads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.peft import from_peft
from fourierft_export.errors import UsageError
from fourierft_export.files.checkpoint import Checkpoint
from fourierft_export.merge.merge import merge_checkpoint

Array = np.ndarray[Any, Any]


def small_roberta(directory: Path) -> Path:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(directory)
    return directory


def bare_llama(stories260k: Path, directory: Path) -> Path:
    from transformers import LlamaModel

    LlamaModel.from_pretrained(stories260k).save_pretrained(directory)
    return directory


def peft_classifier(base: Path, adapter: Path, targets: list[str]) -> Any:
    """A classifier with three labels, PEFT's adapter around it, saved; the live model."""
    from peft import FourierFTConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = FourierFTConfig(
        task_type="SEQ_CLS", target_modules=targets, n_frequency=60, scaling=30.0
    )
    peft = get_peft_model(model, config).eval()
    peft.save_pretrained(adapter)
    return peft


@pytest.mark.parametrize(
    ("family", "targets", "architecture"),
    [
        ("roberta", ["query", "value"], "RobertaForSequenceClassification"),
        ("gpt2", ["c_attn"], "GPT2ForSequenceClassification"),
        ("llama", ["q_proj", "v_proj"], "LlamaForSequenceClassification"),
        ("bare llama", ["q_proj", "v_proj"], "LlamaForSequenceClassification"),
    ],
)
def test_classifiers_of_other_families_load_and_equal_peft(
    stories260k: Path,
    tiny_gpt2: Path,
    tmp_path: Path,
    family: str,
    targets: list[str],
    architecture: str,
) -> None:
    from transformers import AutoModelForSequenceClassification

    base = {
        "roberta": lambda: small_roberta(tmp_path / "base"),
        "gpt2": lambda: tiny_gpt2,
        "llama": lambda: stories260k,
        "bare llama": lambda: bare_llama(stories260k, tmp_path / "base"),
    }[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells that it sets fan_in_fan_out for Conv1D
        peft = peft_classifier(base, tmp_path / "adapter", targets)
    merge_checkpoint(base, from_peft(tmp_path / "adapter", base), tmp_path / "out")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [architecture]
    assert model.config.num_labels == 3
    tokens = torch.randint(5, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = peft(input_ids=tokens).logits
        found = model.eval()(input_ids=tokens).logits
        with peft.disable_adapter():
            assert (peft(input_ids=tokens).logits - expected).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_bare_decoder_gets_its_output_embedding(
    stories260k: Path,
    stories_tokens: Array,
    peft_causal: Callable[..., Path],
    load_peft_causal: Callable[[Path, Path], Any],
    tmp_path: Path,
) -> None:
    """Base LlamaModel (`layers.0...`), adapter of LlamaForCausalLM that targets lm_head."""
    from transformers import AutoModelForCausalLM

    base = bare_llama(stories260k, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the model has tied weights
        adapter = peft_causal(stories260k, target_modules=["v_proj", "lm_head"], scaling=60.0)
        reference = load_peft_causal(stories260k, adapter)
    merge_checkpoint(base, from_peft(adapter, base), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.from_numpy(stories_tokens)
    with torch.no_grad():
        expected = reference(input_ids=tokens).logits
        found = model.eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_an_adapter_of_the_bare_encoder_on_the_task_model(
    tmp_path: Path, make_bundle: Callable[..., Bundle], exact_delta: Callable[..., Array]
) -> None:
    """The prefix the other way round: the checkpoint has it, the adapter does not."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        "bert.layer.0.query.weight": np.ones((6, 4), np.float32),
        "classifier.weight": np.ones((2, 4), np.float32),
    }
    save_file(tensors, base / "model.safetensors")
    bundle = make_bundle(base, ["layer.0.query"])
    merge_checkpoint(base, bundle, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    assert set(found.tensors) == set(tensors)
    exact = 1 + exact_delta(bundle, "layer.0.query")
    np.testing.assert_allclose(found.read("bert.layer.0.query.weight"), exact, atol=1e-6)
    np.testing.assert_array_equal(found.read("classifier.weight"), tensors["classifier.weight"])


def test_a_head_of_an_unknown_kind_is_added_with_a_note(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"layer.0.query.weight": np.ones((6, 4), np.float32)}, base / "model.safetensors")
    (base / "config.json").write_text('{"architectures": ["MadeModel"]}')
    saved = {"tagger.weight": np.full((5, 4), 2, np.float32)}
    bundle = make_bundle(base, ["made.layer.0.query"], saved=saved, task_type=None)
    report = merge_checkpoint(base, bundle, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    assert set(found.tensors) == {"made.layer.0.query.weight", "tagger.weight"}
    np.testing.assert_array_equal(found.read("tagger.weight"), saved["tagger.weight"])
    (note,) = report.notes
    assert "tagger.weight added" in note and "for an adapter without a task type: set" in note


def test_a_head_for_a_single_file_gets_one_note(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"layer.0.query.weight": np.ones((6, 4), np.float32)}, base)
    saved = {"classifier.weight": np.ones((2, 4), np.float32)}
    bundle = make_bundle(base, ["layer.0.query"], saved=saved, task_type="SEQ_CLS")
    report = merge_checkpoint(base, bundle, tmp_path / "out.safetensors")
    assert [note for note in report.notes if "config" in note] == [
        "the base has no config.json: none was made"
    ]
    with pytest.raises(UsageError, match=r"no config\.json"):
        merge_checkpoint(base, bundle, tmp_path / "again.safetensors", labels=["x", "y"])


def test_the_adapter_with_the_head_says_what_task_it_is(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"layer.0.query.weight": np.ones((6, 4), np.float32)}, base / "model.safetensors")
    (base / "config.json").write_text('{"architectures": ["BertModel"]}')
    saved = {"classifier.weight": np.ones((3, 4), np.float32)}
    modules = ["bert.layer.0.query"]
    head = make_bundle(base, modules, saved=saved, task_type="SEQ_CLS")
    other = make_bundle(base, modules, task_type="FEATURE_EXTRACTION", numpy_seed=1)
    report = merge_checkpoint(base, [other, head], tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert list(config["id2label"]) == ["0", "1", "2"]
    assert report.notes == ()


def test_a_head_with_other_labels_replaces_the_bases(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    head = {"classifier.weight": (2, 4), "classifier.bias": (2,)}
    tensors = {"bert.layer.0.query.weight": np.ones((6, 4), np.float32)}
    tensors |= {name: np.ones(shape, np.float32) for name, shape in head.items()}
    save_file(tensors, base / "model.safetensors")
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x", "1": "y"}}
    (base / "config.json").write_text(json.dumps(config))
    saved = {
        "classifier.weight": np.full((3, 4), 2, np.float32),
        "classifier.bias": np.full(3, 2, np.float32),
    }
    bundle = make_bundle(base, ["bert.layer.0.query"], saved=saved, task_type="SEQ_CLS")
    merge_checkpoint(base, bundle, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    for name, value in saved.items():
        np.testing.assert_array_equal(found.read(name), value)
    merged = json.loads((tmp_path / "out/config.json").read_text())
    assert merged["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert merged["architectures"] == ["BertForSequenceClassification"]


def test_a_head_takes_the_dtype_of_the_base(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"layer.0.query.weight": np.ones((6, 4), np.float16)}, base / "model.safetensors")
    saved = {"classifier.weight": np.full((3, 4), 1 / 3, np.float32)}
    bundle = make_bundle(base, ["bert.layer.0.query"], saved=saved, task_type="SEQ_CLS")
    merge_checkpoint(base, bundle, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out").read("classifier.weight")
    np.testing.assert_array_equal(found, np.full((3, 4), 1 / 3, np.float16))


def test_norms_with_their_old_names_are_replaced_not_doubled(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        "layer.0.query.weight": np.ones((6, 4), np.float32),
        "layer.0.LayerNorm.gamma": np.ones(6, np.float32),
        "layer.0.LayerNorm.beta": np.zeros(6, np.float32),
    }
    save_file(tensors, base / "model.safetensors")
    saved = {"bert.layer.0.LayerNorm.bias": np.full(6, 7, np.float32)}
    bundle = make_bundle(base, ["bert.layer.0.query"], saved=saved)
    report = merge_checkpoint(base, bundle, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    assert set(found.tensors) == set(tensors)
    np.testing.assert_array_equal(found.read("layer.0.LayerNorm.beta"), np.full(6, 7))
    assert report.replaced == ("layer.0.LayerNorm.beta",)
    assert report.added == ()
