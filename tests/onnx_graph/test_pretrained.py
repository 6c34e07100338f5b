"""Hugging Face directories with bundles to ONNX, against PyTorch and PEFT on real input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import fourierft_export as ff
from fourierft_export.errors import BaseMismatchError, UsageError
from fourierft_export.models.load import load_model
from fourierft_export.onnx_graph.trace.pretrained import export_pretrained

MODES = ("merged", "unmerged")

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]


def made_adapter(model: torch.nn.Module, seed: int = 5, **fields: Any) -> ff.Bundle:
    """A bundle of random-normal spectra on `model`, which is as it was afterwards."""
    torch.manual_seed(seed)
    ff.inject(model, ff.FourierFTConfig(random_loc_seed=seed, **fields))
    bundle = ff.capture(model)
    ff.detach(model)
    return bundle


def agree(got: np.ndarray, want: np.ndarray) -> None:
    """The bar: 1e-4 of the output's scale, and the same argmax."""
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.fixture(scope="module")
def minilm_files(
    minilm_dir: Path, peft_minilm_adapter: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """MiniLM, bare as its package ships it, with PEFT's own adapter and head."""
    folder = tmp_path_factory.mktemp("minilm")
    bundle = ff.from_peft(peft_minilm_adapter(), minilm_dir)
    files = {}
    for mode in MODES:
        files[mode] = folder / f"{mode}.onnx"
        report = export_pretrained(minilm_dir, bundle, files[mode], mode=mode)
        assert report.inputs == dict.fromkeys(
            ("input_ids", "attention_mask", "token_type_ids"), ("batch", "sequence")
        )
        assert report.outputs == {"logits": ("batch", 2)}
        assert len(report.layers) == 12
    return files


@pytest.mark.parametrize("mode", MODES)
def test_minilm_equals_peft_on_real_sentences(
    mode: str,
    minilm_files: dict[str, Path],
    peft_minilm_adapter: Any,
    load_peft_minilm: Any,
    tokenize: Any,
    sst2_sentences: list[str],
    run: Run,
) -> None:
    model = load_peft_minilm(peft_minilm_adapter())
    inputs = tokenize(sst2_sentences[:64])
    with torch.no_grad():
        want = model(**inputs).logits.numpy()
        with model.disable_adapter():
            base = model(**inputs).logits.numpy()
    got = run(minilm_files[mode], inputs)["logits"]
    agree(got, want)
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(base - want).max() > 1e-3


def test_merged_has_the_nodes_of_the_bare_bases_export(
    tiny_base: Any, tiny_model: Any, tiny_bundle: Any, tmp_path: Path, node_list: Any
) -> None:
    names, path = ["input_ids", "attention_mask", "token_type_ids"], tmp_path / "base.onnx"
    model = tiny_model("bert-cls")
    model.classifier.bias.data.fill_(0.25)  # one that is zero would not be in the graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (),
            kwargs={name: torch.ones(2, 16, dtype=torch.int64) for name in names},
            f=path,
            dynamo=True,
            verbose=False,
            output_names=["logits"],
            dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in names},
        )
    bundle = tiny_bundle("bert-cls", target_modules=["query", "value"])
    export_pretrained(tiny_base("bert-cls"), bundle, tmp_path / "merged.onnx")
    merged, plain = onnx.load(tmp_path / "merged.onnx"), onnx.load(path)
    assert [n[:3] for n in node_list(merged)] == [n[:3] for n in node_list(plain)]
    assert not merged.functions
    names_kept = {t.name for t in plain.graph.initializer}
    assert names_kept <= {t.name for t in merged.graph.initializer}


def test_minilm_unmerged_folds_and_shares_its_entries(
    minilm_files: dict[str, Path], folded: Any
) -> None:
    merged, unmerged = (folded(minilm_files[mode]) for mode in MODES)
    assert [n.op_type for n in unmerged.graph.node] == [n.op_type for n in merged.graph.node]
    assert not unmerged.functions
    proto = onnx.load(minilm_files["unmerged"])
    names = [t.name for t in proto.graph.initializer]
    assert sum(name.endswith(".spectrum") for name in names) == 12
    assert sum(name.endswith(".entries") for name in names) == 1
    tables = [n for n in proto.graph.node if n.op_type == "FourierTable"]
    assert len(tables) == 2
    assert minilm_files["unmerged"].stat().st_size < 1.01 * minilm_files["merged"].stat().st_size


@pytest.mark.parametrize("mode", MODES)
def test_llama_with_tied_head_on_real_text(
    mode: str, cut_stories: Any, stories_tokens: np.ndarray, tmp_path: Path, run: Run
) -> None:
    base_dir = cut_stories(2)
    model = load_model(base_dir, "text-generation")
    targets = ["q_proj", "v_proj", "lm_head"]
    bundle = made_adapter(model, target_modules=targets, n_frequency=100, scaling=40.0)
    path = tmp_path / "model.onnx"
    report = export_pretrained(base_dir, bundle, path, mode=mode)
    vocabulary = model.config.vocab_size
    assert report.inputs == dict.fromkeys(("input_ids", "attention_mask"), ("batch", "sequence"))
    assert report.outputs == {"logits": ("batch", "sequence", vocabulary)}
    ids = torch.from_numpy(stories_tokens)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, 20:] = 0
    with torch.no_grad():
        base = model(**inputs).logits.numpy()
        want = ff.attach(model, bundle)(**inputs).logits.numpy()
    got = run(path, inputs)["logits"]
    seen = inputs["attention_mask"].numpy().astype(bool)
    agree(got[seen], want[seen])
    assert np.abs(got - base)[seen].max() > 0.01 * np.abs(base).max()


def test_gpt2_whose_weights_are_stored_the_other_way_round(
    tiny_gpt2: Path, tmp_path: Path, run: Run
) -> None:
    model = load_model(tiny_gpt2, "text-generation")
    bundle = made_adapter(model, target_modules=["c_attn", "c_proj"], n_frequency=50, scaling=20.0)
    assert all(layer.fan_in_fan_out for layer in bundle.layers)
    path = tmp_path / "model.onnx"
    export_pretrained(tiny_gpt2, bundle, path, mode="unmerged")
    ids = torch.randint(0, 128, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        base = model(**inputs).logits.numpy()
        want = ff.attach(model, bundle)(**inputs).logits.numpy()
    got = run(path, inputs)["logits"]
    agree(got, want)
    assert np.abs(got - base).max() > 0.01 * np.abs(base).max()
    spectra = {t.name for t in onnx.load(path).graph.initializer if t.name.endswith(".spectrum")}
    assert len(spectra) == 6


def test_mistakes_leave_nothing(tiny_gpt2: Path, stories260k: Path, tmp_path: Path) -> None:
    model = load_model(tiny_gpt2, "text-generation")
    bundle = made_adapter(model, target_modules=["c_attn"], n_frequency=50, scaling=20.0)
    out = tmp_path / "model.onnx"
    with pytest.raises(BaseMismatchError):
        export_pretrained(stories260k, bundle, out)
    with pytest.raises(UsageError, match="at least one bundle"):
        export_pretrained(tiny_gpt2, [], out)
    with pytest.raises(UsageError, match="one for each of 1"):
        export_pretrained(tiny_gpt2, bundle, out, weights=[1.0, 2.0])
    with pytest.raises(UsageError, match="finite numbers"):
        export_pretrained(tiny_gpt2, bundle, out, weights=[float("nan")])
    with pytest.raises(UsageError, match="task"):
        export_pretrained(tiny_gpt2, bundle, out, task="translation")
    assert list(tmp_path.iterdir()) == []
