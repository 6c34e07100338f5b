"""validate on real kinds of models: tasks, sides, precisions, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.peft import from_peft
from fourierft_export.bundle.spec import LayerSpec
from fourierft_export.errors import (
    BadInputError,
    BaseMismatchError,
    FileAccessError,
    MissingExtraError,
    UsageError,
    ValidationError,
)
from fourierft_export.merge.merge import merge_checkpoint
from fourierft_export.onnx_graph.pretrained import export_pretrained
from fourierft_export.proof.validate import validate


def rescaled(bundle: Bundle, scaling: float) -> Bundle:
    return Bundle.build(replace(bundle.spec, scaling=scaling), bundle.spectra, bundle.saved)


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
        report = validate(base=classifier.base, bundle=bundle, merged=merged)
        pair = next(p for p in report.comparisons if p.expect == "equal")
        (output,) = pair.outputs
        assert output.difference is not None and output.allowed_abs is not None
        assert output.difference.max_abs < output.allowed_abs / 5
        assert report.ok is (fault == "")
        assert output.resolution is not None and output.resolution < 0.01


def test_a_small_effect_is_told_from_rounding(
    classifier: Any, make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    """The adapter changes less than bfloat16 does: only a base rounded alike shows its effect."""
    bundle = rescaled(classifier.bundle, 0.3)
    for fault in ("", "seed + 1"):
        merged = tmp_path / f"merged{fault}"
        make_adapted(fault, scaling=0.3).to(torch.bfloat16).save_pretrained(merged)
        report = validate(base=classifier.base, bundle=bundle, merged=merged)
        assert report.ok is (fault == "")
        rms = {
            (p.left, p.right): output.difference.rms
            for p in report.comparisons
            for output in p.outputs
            if output.difference is not None
        }
        assert rms["base", "torch"] < 2 * rms["torch", "merged"]
        assert ("base", "merged") not in rms and ("plain:bfloat16", "merged") in rms


def test_an_adapter_without_effect_fails(classifier: Any, plant: Callable[..., Path]) -> None:
    nothing = rescaled(classifier.bundle, 0)
    report = validate(base=classifier.base, bundle=nothing, merged=plant("adapter zeroed"))
    assert all(pair.ok for pair in report.comparisons if pair.expect == "equal")
    with pytest.raises(ValidationError, match="the adapter changes nothing in logits"):
        report.raise_for_failure()


def test_a_head_that_is_not_there_at_all_is_a_problem_by_name(
    classifier: Any, make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    make_adapted().bert.save_pretrained(tmp_path)
    report = validate(base=classifier.base, bundle=classifier.bundle, merged=tmp_path)
    assert not report.ok
    assert len(report.problems) == 1
    assert "classifier.bias, classifier.weight" in report.problems[0]
    with pytest.raises(ValidationError, match=r"lacks classifier\.bias"):
        report.raise_for_failure()


def test_a_base_with_a_head_of_its_own_is_told_from_the_deltas(
    classifier: Any, make_adapted: Callable[..., Any], plant: Callable[..., Path], tmp_path: Path
) -> None:
    """The head alone changes the outputs; that must not pass for the adapter's effect."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    base = tmp_path / "with_head"
    model = AutoModelForSequenceClassification.from_pretrained(classifier.base, num_labels=3)
    model.save_pretrained(base)
    report = validate(base=base, bundle=classifier.bundle, merged=plant())
    report.raise_for_failure()
    assert [side.name for side in report.sides] == ["base", "plain", "torch", "merged"]
    zeroed = validate(base=base, bundle=classifier.bundle, merged=plant("adapter zeroed"))
    failing = {(p.left, p.right) for p in zeroed.comparisons if not p.ok}
    assert ("plain", "merged") in failing and ("base", "merged") not in failing


def test_given_inputs_reach_every_side(
    classifier: Any, plant: Callable[..., Path], clean_onnx: Path, padded_ids: Any, tmp_path: Path
) -> None:
    np.savez(tmp_path / "in.npz", **padded_ids)
    seen = []
    report = validate(
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
    assert [what for what, _, _ in seen] == ["merged", "base", "torch", "onnx:clean.onnx", "done"]
    assert seen[-1][1:] == (4, 4)


def test_any_torch_module_against_a_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, adapted = (
        torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).eval()
        for _ in range(2)
    )
    path = tmp_path / "adapted.onnx"
    torch.onnx.export(
        adapted,
        (torch.ones(2, 6),),
        path,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )

    def side(module: torch.nn.Module) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        return lambda inputs: {"y": module(torch.from_numpy(inputs["x"])).detach().numpy()}

    inputs = {"x": np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)}
    sides = {"base": side(base), "torch": side(adapted)}
    report = validate(sides=sides, onnx=[path], inputs=inputs)
    report.raise_for_failure()
    assert [(p.left, p.right, p.expect) for p in report.comparisons] == [
        ("torch", "onnx:adapted.onnx", "equal"),
        ("base", "torch", "different"),
        ("base", "onnx:adapted.onnx", "different"),
    ]
    swapped = validate(
        sides={"base": side(adapted), "torch": side(base)}, onnx=[path], inputs=inputs
    )
    assert not swapped.ok


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
    bundle = from_peft(adapter, base=stories260k)
    report = validate(base=stories260k, bundle=bundle, peft=adapter, samples=8)
    report.raise_for_failure()
    assert report.task == "causal-lm"
    assert "pseudo-random" in report.inputs
    wrong = rescaled(bundle, 20.2)
    assert not validate(base=stories260k, bundle=wrong, peft=adapter, samples=8).ok


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
    unbound = from_peft(adapter)
    report = validate(base=tiny_gpt2, bundle=unbound, peft=adapter, samples=8)
    report.raise_for_failure()


def test_feature_extraction_with_a_prefix_in_the_adapter(classifier: Any) -> None:
    """A classifier's adapter says `bert.encoder...`; the bare encoder has no such prefix."""
    bundle = Bundle.build(classifier.bundle.spec, classifier.bundle.spectra)
    report = validate(
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


def test_what_does_not_fit_the_base_is_a_mismatch(classifier: Any, tiny_gpt2: Path) -> None:
    bundle = classifier.bundle
    with pytest.raises(BaseMismatchError) as caught:
        validate(base=tiny_gpt2, bundle=bundle, merged=tiny_gpt2, task="causal-lm")
    assert len(caught.value.offenders) == len(bundle.layers)
    headless = Bundle.build(bundle.spec, bundle.spectra)
    with pytest.raises(UsageError, match=r"neither has classifier\.bias, classifier\.weight"):
        validate(base=classifier.base, bundle=headless, merged=classifier.base)


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
            validate(**call)


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
            validate(**call)


def test_a_base_against_its_own_export_changes_nothing(
    classifier: Any, make_adapted: Callable[..., Any], plant: Callable[..., Path], padded_ids: Any
) -> None:
    report = validate(
        base=plant(), merged=plant(), inputs=padded_ids, task="sequence-classification"
    )
    assert not report.ok
    assert report.first_failure is not None
    assert report.first_failure[0].expect == "different"


def test_padded_positions_do_not_count(classifier: Any, padded_ids: Any) -> None:
    mask = padded_ids["attention_mask"].astype(bool)
    hidden = np.random.default_rng(0).normal(size=(12, 20, 4)).astype(np.float32)
    dirty = np.where(mask[..., None], hidden, np.nan).astype(np.float32)
    sides = {"a": lambda x: {"h": hidden}, "b": lambda x: {"h": dirty}}
    assert validate(sides=sides, inputs=padded_ids).ok
    unmasked = {"input_ids": padded_ids["input_ids"]}
    assert not validate(sides=sides, inputs=unmasked).ok


def test_outputs_that_rest_on_random_parameters_are_left_out(
    classifier: Any, tmp_path: Path
) -> None:
    """An encoder saved without its pooler gets a random one wherever it is loaded."""
    from transformers import BertModel

    base = tmp_path / "poolerless"
    BertModel.from_pretrained(classifier.base, add_pooling_layer=False).save_pretrained(base)
    bundle = Bundle.build(classifier.bundle.spec, classifier.bundle.spectra)
    merged = tmp_path / "merged"
    merge_checkpoint(base, bundle, merged)
    pooled = {"pooler_output": np.ones((64, 3))}
    report = validate(
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
    bundle = from_peft(classifier.adapter, base=base)
    merge_checkpoint(base, bundle, tmp_path / "merged")
    report = validate(base=base, bundle=bundle, peft=classifier.adapter, merged=tmp_path / "merged")
    report.raise_for_failure()
    assert {side.name: side.precision for side in report.sides} == {
        "base": "float32",
        "plain:bfloat16": "bfloat16",
        "torch": "float32",
        "torch:bfloat16": "bfloat16",
        "peft": "float32",
        "merged": "bfloat16",
    }
    merge_checkpoint(base, rescaled(bundle, 4.04), tmp_path / "wrong")
    wrong = validate(base=base, bundle=bundle, merged=tmp_path / "wrong")
    assert [(p.left, p.right) for p in wrong.comparisons if not p.ok] == [
        ("torch:bfloat16", "merged")
    ]


def test_a_half_precision_graph(classifier: Any, clean_onnx: Path, plant_onnx: Any) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for source, good in ((clean_onnx, True), (plant_onnx("seed + 1"), False)):
        half = source.with_name(f"half_{good}.onnx")
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), half)
        report = validate(base=classifier.base, bundle=classifier.bundle, onnx=half)
        assert report.sides[-1].precision == "float16"
        assert report.ok is good
        pair = next(p for p in report.comparisons if p.right == f"onnx:{half.name}")
        assert pair.precision == "float16"


@pytest.mark.parametrize("fault", ["", "scaling * 1.01", "seed + 1"])
def test_an_unmerged_graph_of_a_faulty_bundle(classifier: Any, fault: str, tmp_path: Path) -> None:
    spec = classifier.bundle.spec
    # Unbound, so that no hash of the entries gives the other seed away.
    layers = tuple(LayerSpec(layer.name, layer.n_frequency) for layer in spec.layers)
    faulty = Bundle.build(
        replace(
            spec,
            layers=layers,
            seed=spec.seed + (fault == "seed + 1"),
            scaling=spec.scaling * (1.01 if fault == "scaling * 1.01" else 1),
        ),
        classifier.bundle.spectra,
        classifier.bundle.saved,
    )
    path = tmp_path / "model.onnx"
    export_pretrained(classifier.base, faulty, path, mode="unmerged")
    report = validate(base=classifier.base, bundle=classifier.bundle, onnx=path)
    assert report.ok is (fault == "")


def test_a_graph_of_fixed_size_gets_inputs_of_that_size(
    classifier: Any, clean_onnx: Path, tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(clean_onnx)
    for value in model.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, (4, 24), strict=True):
            axis.dim_value = size
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    report = validate(base=classifier.base, bundle=classifier.bundle, onnx=path, samples=8)
    report.raise_for_failure()
    assert dict(report.input_shapes)["input_ids"] == (8, 24)
    with pytest.raises(UsageError, match="a number of rows that 4 divides"):
        validate(base=classifier.base, bundle=classifier.bundle, onnx=path, samples=7)


def test_without_peft_the_error_names_the_extra(
    classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"fourierft-export\[test\]"):
        validate(base=classifier.base, bundle=classifier.bundle, peft=classifier.adapter)


def test_minilm_with_an_adapter_of_peft(
    minilm_dir: Path, peft_minilm_adapter: Callable[..., Path]
) -> None:
    adapter = peft_minilm_adapter(scaling=100.0)
    bundle = from_peft(adapter, base=minilm_dir)
    report = validate(base=minilm_dir, bundle=bundle, peft=adapter)
    report.raise_for_failure()
    assert dict(report.sides[0].outputs)["logits"] == (64, 2)
    assert f"64 sentences, with the tokenizer in {minilm_dir}" == report.inputs
    for wrong in (
        rescaled(bundle, 101.0),
        Bundle.build(bundle.spec, bundle.spectra, {n: a * 1.01 for n, a in bundle.saved.items()}),
    ):
        assert not validate(base=minilm_dir, bundle=wrong, peft=adapter, samples=16).ok


def test_a_graph_with_an_output_for_the_whole_batch(tmp_path: Path) -> None:
    """Rows are run in batches only where every output has a row per example."""
    import onnx
    from onnx import TensorProto, helper

    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["n", "t"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "t"])
    outputs = [helper.make_tensor_value_info(n, TensorProto.INT64, None) for n in ("sum", "rows")]
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["rows"]),
        helper.make_node("ReduceSum", ["rows"], ["sum"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "g", [ids, mask], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "sum.onnx")
    inputs = {
        "input_ids": np.arange(40).reshape(10, 4),
        "attention_mask": np.ones((10, 4), np.int64),
    }

    def expected(given: Mapping[str, Any]) -> dict[str, Any]:
        return {"rows": given["input_ids"], "sum": np.int64(780)}

    report = validate(
        sides={"numpy": expected}, onnx=tmp_path / "sum.onnx", inputs=inputs, batch_size=3
    )
    report.raise_for_failure()
    floats = inputs | {"input_ids": np.ones((10, 4))}
    with pytest.raises(UsageError, match="input input_ids: expected int64"):
        validate(sides={"numpy": expected}, onnx=tmp_path / "sum.onnx", inputs=floats)
