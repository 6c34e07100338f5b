"""Causal models with a key-value cache: generation in ONNX Runtime as transformers generates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import fourierft_export as ff
from fourierft_export.errors import UsageError
from fourierft_export.models.load import load_model
from fourierft_export.onnx_graph.trace.model_parts import CachedModel
from fourierft_export.onnx_graph.trace.pretrained import export_pretrained
from fourierft_export.proof.validate import validate

MODES = ("merged", "unmerged")
NEW_TOKENS = 50


@pytest.fixture(scope="module")
def base(cut_stories: Any) -> Path:
    return Path(cut_stories(2))


@pytest.fixture(scope="module")
def adapted(base: Path) -> tuple[torch.nn.Module, ff.Bundle]:
    """The base with an adapter of q_proj and v_proj attached."""
    model, targets = load_model(base, "text-generation"), ["q_proj", "v_proj"]
    torch.manual_seed(0)
    ff.inject(model, ff.FourierFTConfig(target_modules=targets, n_frequency=100, scaling=300.0))
    bundle = ff.capture(model)
    return ff.attach(ff.detach(model), bundle), bundle


@pytest.fixture(scope="module")
def files(
    base: Path, adapted: tuple[Any, ff.Bundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cache")
    paths = {mode: folder / f"{mode}.onnx" for mode in MODES}
    for mode, path in paths.items():
        report = export_pretrained(base, adapted[1], path, mode=mode, cache=True)
        assert report.layers == tuple(layer.name for layer in adapted[1].layers)
    return paths


class Generator:
    """Greedy generation with a cached graph, from the very first token on an empty cache."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.empty = {
            value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.constant: dict[str, np.ndarray] = {}
        self.positions = "position_ids" in {value.name for value in self.session.get_inputs()}

    def step(
        self, ids: np.ndarray, mask: np.ndarray, past: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Outputs by name; positions are counted over the tokens that are not padding."""
        feeds: dict[str, np.ndarray] = {
            "input_ids": ids,
            "attention_mask": mask,
            **past,
            **self.constant,
        }
        if self.positions:
            positions = np.maximum(mask.cumsum(-1) - 1, 0)
            feeds["position_ids"] = positions[:, -ids.shape[1] :]
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))

    def start(self, batch: int) -> dict[str, np.ndarray]:
        return {name: np.repeat(value, batch, axis=0) for name, value in self.empty.items()}

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        past, new = self.start(len(ids)), ids
        for _ in range(NEW_TOKENS):
            outputs = self.step(new, mask, past)
            past = {f"past_key_values.{k[8:]}": v for k, v in outputs.items() if k != "logits"}
            new = outputs["logits"][:, -1:].argmax(-1)
            ids = np.concatenate([ids, new], axis=1)
            mask = np.concatenate([mask, np.ones_like(new)], axis=1)
        return ids


def generated(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    found = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return np.asarray(found)


@pytest.mark.parametrize("mode", MODES)
def test_fifty_tokens_are_those_of_pytorch(
    mode: str, files: dict[str, Path], adapted: tuple[Any, ff.Bundle], stories_tokens: np.ndarray
) -> None:
    model, _ = adapted
    prompt = stories_tokens[:1, :5]
    want = generated(model, prompt, np.ones_like(prompt))
    generate = Generator(files[mode])
    np.testing.assert_array_equal(generate(prompt, np.ones_like(prompt)), want)
    # From the first token alone, and several rows, padded on the left.
    first = prompt[:, :1]
    np.testing.assert_array_equal(
        generate(first, np.ones_like(first)), generated(model, first, np.ones_like(first))
    )
    rows, mask = stories_tokens[:, :6].copy(), np.ones((3, 6), np.int64)
    rows[1, :3], mask[1, :3] = 0, 0
    np.testing.assert_array_equal(generate(rows, mask), generated(model, rows, mask))
    ff.detach(model)
    try:
        base = generated(model, prompt, np.ones_like(prompt))
    finally:
        ff.attach(model, adapted[1])
    assert (want != base).any()


@pytest.mark.parametrize("mode", MODES)
def test_logits_and_cache_are_those_of_one_long_run(
    mode: str, files: dict[str, Path], adapted: tuple[Any, ff.Bundle], stories_tokens: np.ndarray
) -> None:
    model, _ = adapted
    with torch.no_grad():
        want = model(torch.from_numpy(stories_tokens), use_cache=True)
    generator, past, mask = Generator(files[mode]), None, np.ones_like(stories_tokens)
    past, parts = generator.start(len(stories_tokens)), []
    for start, stop in ((0, 9), (9, 10), (10, 24)):
        outputs = generator.step(stories_tokens[:, start:stop], mask[:, :stop], past)
        past = {f"past_key_values.{k[8:]}": v for k, v in outputs.items() if k != "logits"}
        parts.append(outputs["logits"])
    whole = want.logits.numpy()
    found = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-4 * np.abs(whole).max())
    np.testing.assert_array_equal(found.argmax(-1), whole.argmax(-1))
    for i, layer in enumerate(want.past_key_values.layers):
        for kind, tensor in (("key", layer.keys), ("value", layer.values)):
            got, exact = past[f"past_key_values.{i}.{kind}"], tensor.numpy()
            np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


def test_graphs_with_a_cache_are_validated(
    files: dict[str, Path], base: Path, adapted: tuple[Any, ff.Bundle]
) -> None:
    report = validate(base=base, bundle=adapted[1], onnx=list(files.values()), samples=6, threads=1)
    assert report.ok, report.problems
    pairs = {frozenset((pair.left, pair.right)) for pair in report.comparisons}
    assert {frozenset(("torch", f"onnx:{mode}.onnx")) for mode in MODES} <= pairs
    logits = [o for pair in report.comparisons for o in pair.outputs if o.output == "logits"]
    assert len(logits) == len(report.comparisons)


def test_the_reference_evaluator_agrees_and_nothing_is_double(
    files: dict[str, Path], stories_tokens: np.ndarray, folded: Any
) -> None:
    generator = Generator(files["unmerged"])
    ids, past = stories_tokens[:2, :7], generator.start(2)
    first = generator.step(ids, np.ones_like(ids), past)
    past = {f"past_key_values.{k[8:]}": v for k, v in first.items() if k != "logits"}
    new, mask = stories_tokens[:2, 7:9], np.ones((2, 9), np.int64)
    got = generator.step(new, mask, past)
    feeds = {"input_ids": new, "attention_mask": mask, "position_ids": mask[:, 7:] * [7, 8], **past}
    want = ReferenceEvaluator(str(files["unmerged"])).run(list(got), feeds)
    for array, exact in zip(got.values(), want, strict=True):
        np.testing.assert_allclose(array, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    graph = onnx.shape_inference.infer_shapes(folded(files["unmerged"])).graph
    kinds = {value.type.tensor_type.elem_type for value in graph.value_info}
    assert onnx.TensorProto.FLOAT in kinds
    assert onnx.TensorProto.DOUBLE not in kinds | {t.data_type for t in graph.initializer}


def test_names_and_sizes(files: dict[str, Path]) -> None:
    model = onnx.load(files["merged"])

    def shapes(values: Any) -> dict[str, list[Any]]:
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    past = {
        f"past_key_values.{i}.{kind}": ["batch", 4, "past_sequence", 8]
        for i in range(2)
        for kind in ("key", "value")
    }
    inputs = shapes(model.graph.input)
    assert inputs == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        **past,
    }
    outputs = shapes(model.graph.output)
    present = [name.replace("past_key_values", "present") for name in past]
    assert list(outputs) == ["logits", *present]
    assert outputs["logits"] == ["batch", "sequence", 512]
    names = {tensor.name for tensor in onnx.load(files["unmerged"]).graph.initializer}
    assert "model.layers.0.self_attn.q_proj.spectrum" in names


@pytest.mark.parametrize("mode", ["unmerged", "swappable", "paired", "bank"])
def test_gpt2_generates_as_pytorch(mode: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    model = load_model(tiny_gpt2, "text-generation")
    ids = np.array([[5, 17, 60, 3]])
    base = generated(model, ids, np.ones_like(ids))
    torch.manual_seed(3)
    targets = ["c_attn", "c_proj"]
    ff.inject(model, ff.FourierFTConfig(target_modules=targets, n_frequency=50, scaling=300.0))
    path = tmp_path / "model.onnx"
    export_pretrained(tiny_gpt2, ff.capture(model), path, mode=mode, cache=True)
    generate = Generator(path)
    if mode == "bank":
        generate.constant["adapter_id"] = np.array([1])
    want = generated(model, ids, np.ones_like(ids))
    np.testing.assert_array_equal(generate(ids, np.ones_like(ids)), want)
    assert (want != base).any()
    assert len(set(want[0])) > 15


def test_models_without_such_a_cache(minilm_dir: Path, tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
    )
    with pytest.raises(UsageError, match="DynamicSlidingWindowLayer"):
        CachedModel(MistralForCausalLM(config))
    encoder = load_model(minilm_dir, "feature-extraction")
    with pytest.raises(UsageError, match="no such cache"):
        CachedModel(encoder)
    bundle = ff.capture(ff.inject(encoder, ff.FourierFTConfig(target_modules=["query"])))
    with pytest.raises(UsageError, match=r"key-value cache.*text-generation"):
        export_pretrained(minilm_dir, bundle, tmp_path / "model.onnx", cache=True)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_onnxruntime_genai_runs(
    base: Path, adapted: tuple[Any, ff.Bundle], run_verb: Any, tmp_path: Path
) -> None:
    """Its config names the graph's own inputs, outputs and sizes (tried with genai 0.18)."""
    base = Path(shutil.copytree(base, tmp_path / "base"))
    (base / "tokenizer.json").write_text("{}")
    bundle, folder = adapted[1].save(tmp_path / "a.fourierft.safetensors"), tmp_path / "out"
    folder.mkdir()
    words = ("export", "--base", base, "--bundle", bundle, "--mode", "merged", "--genai", "-o")
    assert run_verb(*words, folder / "model.onnx").code == 0
    assert {file.name for file in folder.iterdir()} == {
        "model.onnx", "genai_config.json", "tokenizer.json",
    }  # fmt: skip
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    decoder, graph = model["decoder"], onnx.load(folder / "model.onnx").graph
    layers = range(decoder["num_hidden_layers"])
    names = [
        name % i if "%d" in name else name
        for name in (*decoder["inputs"].values(), *decoder["outputs"].values())
        for i in (layers if "%d" in name else [0])
    ]
    assert set(names) == {value.name for value in (*graph.input, *graph.output)}
    past = next(value for value in graph.input if "past" in value.name).type.tensor_type.shape
    assert past.dim[1].dim_value == decoder["num_key_value_heads"]
    assert past.dim[3].dim_value == decoder["head_size"]
    assert model["vocab_size"] == graph.output[0].type.tensor_type.shape.dim[2].dim_value
    assert (model["bos_token_id"], model["eos_token_id"]) == (1, 2)
    # What lies there is not replaced unasked, not even a tokenizer.
    assert run_verb(*words, folder / "other.onnx").code == 2
