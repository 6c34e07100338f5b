"""validate on real kinds of models: tasks, sides, precisions, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fourierft_export as ff
from fourierft_export.errors import BadInputError, ValidationError


def rescaled(bundle: ff.Bundle, scaling: float) -> ff.Bundle:
    return ff.Bundle.build(replace(bundle.spec, scaling=scaling), bundle.spectra, bundle.saved)


def make_peft(base: Path, auto: str, out: Path, **fields: Any) -> Path:
    import transformers
    from peft import FourierFTConfig, get_peft_model

    torch.manual_seed(11)
    model = getattr(transformers, auto).from_pretrained(base)
    get_peft_model(model, FourierFTConfig(**fields)).save_pretrained(out)
    return out


def test_a_small_effect_is_measured_with_a_fine_rule(
    classifier: Any, make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    """The fault is far below a ten-thousandth of the output, and found all the same."""
    scaling = 0.02
    bundle = rescaled(classifier.bundle, scaling)
    for fault in ("", "scaling * 1.01"):
        merged = tmp_path / f"merged{fault}"
        make_adapted(fault, scaling=scaling).save_pretrained(merged)
        report = ff.validate(base=classifier.base, bundle=bundle, merged=merged)
        pair = next(p for p in report.comparisons if p.expect == "equal")
        (output,) = pair.outputs
        assert output.difference is not None and output.allowed_abs is not None
        assert output.difference.max_abs < output.allowed_abs / 5
        assert report.ok is (fault == "")
        assert output.resolution is not None and output.resolution < 0.01


def test_a_small_effect_is_not_taken_for_rounding(
    classifier: Any, make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    """The adapter changes less than bfloat16 does: only a base rounded alike shows its effect."""
    bundle = rescaled(classifier.bundle, 0.2)
    for fault in ("", "seed + 1"):
        merged = tmp_path / f"merged{fault}"
        make_adapted(fault, scaling=0.2).to(torch.bfloat16).save_pretrained(merged)
        report = ff.validate(base=classifier.base, bundle=bundle, merged=merged)
        assert report.ok is (fault == "")
        rms = {
            (p.left, p.right): output.difference.rms
            for p in report.comparisons
            for output in p.outputs
            if output.difference is not None
        }
        assert rms["base", "torch"] < 2 * rms["torch", "merged"]
        assert ("base", "merged") not in rms and ("plain:bfloat16", "merged") in rms


def test_a_head_that_is_not_there_at_all_is_a_problem_by_name(
    classifier: Any, make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    make_adapted().bert.save_pretrained(tmp_path)
    report = ff.validate(base=classifier.base, bundle=classifier.bundle, merged=tmp_path)
    assert not report.ok
    assert len(report.problems) == 1
    assert "classifier.bias, classifier.weight" in report.problems[0]
    with pytest.raises(ValidationError, match=r"lacks classifier\.bias"):
        report.raise_for_failure()


def test_a_base_with_another_head_is_not_taken_for_an_effect(
    classifier: Any, make_adapted: Callable[..., Any], plant: Callable[..., Path], tmp_path: Path
) -> None:
    """The head alone changes the outputs; that must not pass for the adapter's effect."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    base = tmp_path / "with_head"
    model = AutoModelForSequenceClassification.from_pretrained(classifier.base, num_labels=3)
    model.save_pretrained(base)
    report = ff.validate(base=base, bundle=classifier.bundle, merged=plant())
    report.raise_for_failure()
    assert [side.name for side in report.sides] == ["base", "plain", "torch", "merged"]
    zeroed = ff.validate(base=base, bundle=classifier.bundle, merged=plant("adapter zeroed"))
    failing = {(p.left, p.right) for p in zeroed.comparisons if not p.ok}
    assert ("plain", "merged") in failing and ("base", "merged") not in failing


def test_given_inputs_reach_every_side(
    classifier: Any, plant: Callable[..., Path], clean_onnx: Path, padded_ids: Any, tmp_path: Path
) -> None:
    np.savez(tmp_path / "in.npz", **padded_ids)
    seen = []
    report = ff.validate(
        base=classifier.base,
        bundle=classifier.bundle,
        merged=plant(),
        onnx=clean_onnx,
        inputs=tmp_path / "in.npz",
        batch_size=5,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    report.raise_for_failure()
    assert {dict(side.outputs)["logits"] for side in report.sides} == {(12, 3)}
    steps = [f"running {name}" for name in ("merged", "base", "torch", "onnx:clean.onnx")]
    steps.append("comparing")
    assert [what for what, _, _ in seen] == steps
    assert seen[-1][1:] == (4, 4)


def test_a_causal_model_with_a_tied_head(stories260k: Path, tmp_path: Path) -> None:
    """lm_head is targeted: its own copy changes, the embeddings stay, as in PEFT's forward."""
    fields = {"target_modules": ["q_proj", "v_proj", "lm_head"], "n_frequency": 100}
    adapter = make_peft(
        stories260k,
        "AutoModelForCausalLM",
        tmp_path / "adapter",
        task_type="CAUSAL_LM",
        scaling=20.0,
        **fields,
    )
    bundle = ff.from_peft(adapter, base=stories260k)
    report = ff.validate(base=stories260k, bundle=bundle, peft=adapter, samples=8)
    report.raise_for_failure()
    assert report.task == "text-generation"
    assert "pseudo-random" in report.inputs
    wrong = rescaled(bundle, 20.2)
    assert not ff.validate(base=stories260k, bundle=wrong, peft=adapter, samples=8).ok


def test_a_gpt2_with_conv1d_layers(tiny_gpt2: Path, tmp_path: Path) -> None:
    adapter = make_peft(
        tiny_gpt2,
        "AutoModelForCausalLM",
        tmp_path / "adapter",
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "mlp.c_proj"],
        n_frequency=60,
        scaling=30.0,
        fan_in_fan_out=True,
    )
    unbound = ff.from_peft(adapter)
    report = ff.validate(base=tiny_gpt2, bundle=unbound, peft=adapter, samples=8)
    report.raise_for_failure()


def test_feature_extraction_with_a_prefix_in_the_adapter(classifier: Any) -> None:
    """A classifier's adapter says `bert.encoder...`; the bare encoder has no such prefix."""
    bundle = ff.Bundle.build(classifier.bundle.spec, classifier.bundle.spectra)
    report = ff.validate(
        base=classifier.base,
        bundle=bundle,
        sides={"again": lambda x: {}},
        task="feature-extraction",
    )
    torch_side = next(side for side in report.sides if side.name == "torch")
    assert [name for name, _ in torch_side.outputs] == ["last_hidden_state", "pooler_output"]
    failing = {(p.left, p.right) for p in report.comparisons if not p.ok}
    assert failing == {("torch", "again"), ("base", "again")}
    change = next(p for p in report.comparisons if (p.left, p.right) == ("base", "torch"))
    assert [output.ok for output in change.outputs] == [True, True]


def test_padded_positions_do_not_count(classifier: Any, padded_ids: Any) -> None:
    mask = padded_ids["attention_mask"].astype(bool)
    hidden = np.random.default_rng(0).normal(size=(12, 20, 4)).astype(np.float32)
    dirty = np.where(mask[..., None], hidden, np.nan).astype(np.float32)
    sides = {"a": lambda x: {"h": hidden}, "b": lambda x: {"h": dirty}}
    assert ff.validate(sides=sides, inputs=padded_ids).ok
    unmasked = {"input_ids": padded_ids["input_ids"]}
    assert not ff.validate(sides=sides, inputs=unmasked).ok


def test_outputs_that_rest_on_random_parameters_are_left_out(
    classifier: Any, tmp_path: Path
) -> None:
    """An encoder saved without its pooler gets a random one wherever it is loaded."""
    from transformers import BertModel

    base = tmp_path / "poolerless"
    BertModel.from_pretrained(classifier.base, add_pooling_layer=False).save_pretrained(base)
    bundle = ff.Bundle.build(classifier.bundle.spec, classifier.bundle.spectra)
    merged = tmp_path / "merged"
    ff.merge_checkpoint(base, bundle, merged)
    pooled = {"pooler_output": np.ones((64, 3))}
    report = ff.validate(
        base=base,
        bundle=bundle,
        merged=merged,
        sides={"graph": lambda x: hidden_states(merged, x) | pooled},
        task="feature-extraction",
    )
    report.raise_for_failure()
    names = {output.output for pair in report.comparisons for output in pair.outputs}
    assert names == {"last_hidden_state"}
    assert any("pooler.dense.weight" in note for side in report.sides for note in side.notes)


def hidden_states(directory: Path, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        result = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {"last_hidden_state": result.last_hidden_state.numpy()}


def test_a_base_and_merge_in_bfloat16(classifier: Any, tmp_path: Path) -> None:
    """The base is bfloat16 already; PEFT computes W + delta in float32, the merge rounds it."""
    from transformers import BertModel

    base = tmp_path / "base"
    BertModel.from_pretrained(classifier.base).to(torch.bfloat16).save_pretrained(base)
    bundle = ff.from_peft(classifier.adapter, base=base)
    ff.merge_checkpoint(base, bundle, tmp_path / "merged")
    report = ff.validate(
        base=base, bundle=bundle, peft=classifier.adapter, merged=tmp_path / "merged"
    )
    report.raise_for_failure()
    assert {side.name: side.precision for side in report.sides} == {
        "base": "float32",
        "plain:bfloat16": "bfloat16",
        "torch": "float32",
        "torch:bfloat16": "bfloat16",
        "peft": "float32",
        "merged": "bfloat16",
    }
    ff.merge_checkpoint(base, rescaled(bundle, 4.04), tmp_path / "wrong")
    wrong = ff.validate(base=base, bundle=bundle, merged=tmp_path / "wrong")
    assert [(p.left, p.right) for p in wrong.comparisons if not p.ok] == [
        ("torch:bfloat16", "merged")
    ]


def test_a_decoder_is_run_too(
    tiny_base: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """T5 reads tie_word_embeddings as whether to scale the decoder's outputs."""
    base, fields = tiny_base("t5"), {"target_modules": ["q", "v"], "modules_to_save": ["lm_head"]}
    adapter, merged = tiny_adapter("t5", **fields), tmp_path / "merged"
    ff.merge_checkpoint(base, adapter, merged)
    report = ff.validate(base=base, bundle=adapter, peft=adapter, merged=merged)
    report.raise_for_failure()
    assert all({"last_hidden_state", "logits"} == {*dict(side.outputs)} for side in report.sides)
    ff.export_pretrained(base, adapter, tmp_path / "encoder.onnx")
    report = ff.validate(base=base, bundle=adapter, onnx=tmp_path / "encoder.onnx")
    assert report.ok and "its decoder was not run" in report.notes[0]
    config = json.loads((merged / "config.json").read_text())
    scaled = {name: not config.get(name) for name in ("scale_decoder_outputs",)}
    scaled["tie_word_embeddings"] = not config.get("tie_word_embeddings")
    (merged / "config.json").write_text(json.dumps(config | scaled))
    report = ff.validate(base=base, bundle=adapter, merged=merged)
    assert [name for place, _ in report.findings for name in place.split()[-1:]] == ["logits"]


def test_a_model_whose_rows_relate_to_each_other(tmp_path: Path) -> None:
    """CLIP compares every text with every image: all outputs, on all rows at once."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": 40, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes, projection_dim=8))
    model.save_pretrained(tmp_path / "base")
    fields = {"target_modules": ["q_proj"], "n_frequency": 20, "scaling": 40.0}
    adapter = make_peft(tmp_path / "base", "AutoModel", tmp_path / "adapter", **fields)
    ff.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    random = np.random.default_rng(0)
    inputs = {"input_ids": random.integers(3, 40, size=(5, 6))}
    inputs["attention_mask"] = np.ones((5, 6), np.int64)
    inputs["pixel_values"] = random.normal(size=(5, 3, 8, 8)).astype(np.float32)  # type: ignore[assignment]
    loaded = CLIPModel.from_pretrained(tmp_path / "base")
    examples = {name: torch.from_numpy(array) for name, array in inputs.items()}
    exported = ff.export_onnx(ff.attach(loaded, adapter), examples, tmp_path / "clip.onnx")
    report = ff.validate(
        base=tmp_path / "base",
        bundle=adapter,
        merged=tmp_path / "merged",
        peft=adapter,
        onnx=tmp_path / "clip.onnx",
        inputs=inputs,
        batch_size=2,
    )
    report.raise_for_failure()
    outputs = dict(report.sides[0].outputs)
    assert outputs["logits_per_text"] == (5, 5)
    # Outputs inside outputs have names of their own.
    assert outputs["text_model_output.last_hidden_state"] == (5, 6, 16)
    assert list(outputs) == list(exported.outputs)


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 10**7), ("num_labels", 10**9)])
def test_a_config_with_absurd_counts_is_refused(
    classifier: Any, tmp_path: Path, field: str, value: int
) -> None:
    shutil.copytree(classifier.base, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(BadInputError, match=f"{field} of at most"):
        ff.validate(base=tmp_path / "base", merged=classifier.base, task="text-classification")


def test_no_expression_of_a_config_is_run_in_peft(classifier: Any, tmp_path: Path) -> None:
    bomb = "([a-z.]+)+[A-Z]"
    adapter = tmp_path / "adapter"
    shutil.copytree(classifier.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for fields in ({"target_modules": bomb}, {"exclude_modules": bomb}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | fields))
        ff.validate(
            base=classifier.base, bundle=classifier.bundle, peft=adapter
        ).raise_for_failure()
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": [bomb]}))
    with pytest.raises(BadInputError, match="no expressions"):
        ff.validate(base=classifier.base, bundle=classifier.bundle, peft=adapter)
