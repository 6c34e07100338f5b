"""Merges into models of many families: what transformers loads computes what PEFT computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import fourierft_export as ff
from fourierft_export.errors import UsageError

Array = np.ndarray[Any, Any]
TOKENS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def outputs(model: Any) -> torch.Tensor:
    if model.config.model_type == "vit":
        pixels = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        return torch.as_tensor(model(pixel_values=pixels).logits)
    more = {"decoder_input_ids": TOKENS} if model.config.model_type == "t5" else {}
    return torch.as_tensor(model(input_ids=TOKENS, **more).logits)


# The adapter's model; the part of it that is the base ("" for all of it); PEFT's fields; tensors
# that the output has and the base has not, apart from a prefix.
ROWS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "a bare BERT": ("bert-cls", "bert", {"target_modules": ["query", "value"]},
                    {"classifier.weight", "classifier.bias"}),
    "BERT with a head": ("bert-cls", "", {"target_modules": ["query"], "bias": "fourier_only"},
                         set()),
    "a bare RoBERTa": ("roberta-cls", "roberta", {"target_modules": ["query"]},
                       {"classifier.dense.weight", "classifier.dense.bias",
                        "classifier.out_proj.weight", "classifier.out_proj.bias"}),
    "Conv1D": ("gpt2", "", {"target_modules": ["c_attn", "mlp.c_proj"]}, set()),
    "Llama": ("llama", "", {"target_modules": ["q_proj", "down_proj"]}, set()),
    "a bare Llama, a classifier": ("llama-cls", "model", {"target_modules": ["v_proj"]},
                                   {"score.weight"}),
    "tied, lm_head adapted": ("llama-tied", "", {"target_modules": ["q_proj", "lm_head"]},
                              {"lm_head.weight"}),
    "a bare decoder": ("llama-tied", "model", {"target_modules": ["v_proj", "lm_head"]},
                       {"lm_head.weight"}),
    "T5": ("t5", "", {"target_modules": ["q", "wi"]}, set()),
    "ViT": ("vit", "", {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}, set()),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_the_merged_model_is_pefts(
    row: str, tiny_model: Any, tiny_base: Any, tiny_adapter: Any, load_peft: Any, tmp_path: Path
) -> None:
    kind, part, fields, added = ROWS[row]
    full = tiny_base(kind)
    if part:
        getattr(tiny_model(kind), part).save_pretrained(tmp_path / "base")
    base = tmp_path / "base" if part else full
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of Conv1D and of tied weights
        adapter = tiny_adapter(kind, **fields, scaling=60.0)
        peft = load_peft(full, adapter)
    report = ff.merge_checkpoint(base, ff.from_peft(adapter, base), tmp_path / "out")
    assert set(report.added) == added
    assert report.bundles[0].base_check == "same"
    class_ = type(peft.base_model.model)
    model, info = class_.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [class_.__name__]
    with torch.no_grad():
        expected, found = outputs(peft), outputs(model.eval())
        with peft.disable_adapter():
            assert (outputs(peft) - expected).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    if "lm_head" in fields["target_modules"]:  # where PEFT's merge would change the embedding, too
        assert config["tie_word_embeddings"] is False
        assert any("was tied" in note for note in report.notes)
        return
    if kind == "roberta-cls":  # PEFT fails to merge where the head is several layers
        return
    merged = peft.merge_and_unload().state_dict()
    for name, value in model.state_dict().items():
        assert (value - merged[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"]])
def test_a_tied_embedding_that_was_trained_whole_is_untied(
    tiny_base: Any, tiny_adapter: Any, tmp_path: Path, modules: list[str]
) -> None:
    """The adapter holds both sides of a tie apart: only the trained one may change."""
    from transformers import AutoModelForCausalLM

    base = tiny_base("llama-tied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the model has tied weights
        adapter = tiny_adapter("llama-tied", target_modules=["q_proj"], modules_to_save=modules)
    bundle = ff.from_peft(adapter, base)
    name = next(iter(bundle.saved))
    embedding = AutoModelForCausalLM.from_pretrained(base).model.embed_tokens.weight
    doubled = {name: (2 * embedding).detach().numpy()}
    changed = ff.Bundle.build(bundle.spec, bundle.spectra, doubled)
    ff.merge_checkpoint(base, changed, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    factor = {"lm_head": (2, 1), "embed_tokens": (1, 2)}[modules[0]]
    assert torch.equal(model.lm_head.weight, embedding * factor[0])
    assert torch.equal(model.model.embed_tokens.weight, embedding * factor[1])


@pytest.mark.parametrize(
    ("dtype", "mantissa", "smallest"),
    [("float32", 24, -126), ("float16", 11, -14), ("bfloat16", 8, -126)],
)  # fmt: skip
def test_every_dtype_is_rounded_once_and_no_further_off_than_pefts(
    dtype: str, mantissa: int, smallest: int, tiny_base: Any, tiny_adapter: Any, load_peft: Any,
    exact_delta: Callable[..., Array], tensors_of: Callable[[Path], dict[str, Array]],
    tmp_path: Path,
) -> None:  # fmt: skip
    adapter = tiny_adapter("bert-cls", target_modules=["query", "value"], scaling=20.0)
    bundle = ff.from_peft(adapter, tiny_base("bert-cls"))
    base = tiny_base("bert-cls", dtype)
    report = ff.merge_checkpoint(base, bundle, tmp_path / "out")
    assert report.bundles[0].base_check == ("same" if dtype == "float32" else "precision")
    assert any("another precision" in note for note in report.notes) == (dtype != "float32")
    peft = load_peft(base, adapter, dtype).merge_and_unload().state_dict()
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    ours = theirs = 0.0
    for layer in report.layers:
        delta = exact_delta(bundle, layer.name)
        exact = before[layer.tensor].astype(np.float64) + delta
        error = np.abs(after[layer.tensor].astype(np.float64) - exact)
        _, exponent = np.frexp(exact)
        compute_half_unit = np.ldexp(0.5, np.maximum(exponent - 1, smallest) + 1 - mantissa)
        assert (error <= compute_half_unit + 1e-6 * np.abs(delta).max()).all(), layer.name
        ours += np.square(error).sum()
        theirs += np.square(peft[layer.tensor].double().numpy() - exact).sum()
    assert ours < theirs or dtype == "float32"
    converted = ff.merge_checkpoint(
        tiny_base("bert-cls"), bundle, tmp_path / "converted", dtype=dtype
    )
    assert {layer.dtype for layer in converted.layers} == {report.layers[0].dtype}
    config = json.loads((tmp_path / "converted/config.json").read_text())
    assert config["dtype"] == dtype


QUERY = {"layer.0.query.weight": np.ones((6, 4), np.float32)}


def make_checkpoint(folder: Path, more: dict[str, Array], config: dict[str, Any] | None) -> Path:
    folder.mkdir()
    save_file({**QUERY, **more}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_of_the_bare_encoder_on_the_task_model(
    tmp_path: Path, make_bundle: Any, exact_delta: Any, tensors_of: Any
) -> None:
    """The prefix the other way round: the checkpoint has it, the adapter does not."""
    base = tmp_path / "base"
    base.mkdir()
    head = {"classifier.weight": np.ones((2, 4), np.float32)}
    save_file({f"bert.{k}": v for k, v in QUERY.items()} | head, base / "model.safetensors")
    bundle = make_bundle(base, ["layer.0.query"])
    ff.merge_checkpoint(base, bundle, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    exact = 1 + exact_delta(bundle, "layer.0.query")
    np.testing.assert_allclose(found.pop("bert.layer.0.query.weight"), exact, atol=1e-6)
    assert found.keys() == head.keys()


LABELS = ["LABEL_0", "LABEL_1", "LABEL_2"]
CLASSIFIER = "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("config", "more", "saved", "task_type", "options", "expected", "notes"),
    [
        # Labels may be named; else they are numbered, or kept where their number is right.
        ({"architectures": ["BertModel"]}, {}, "classifier", "SEQ_CLS",
         {"labels": ["x", "y", "z"]}, (CLASSIFIER, ["x", "y", "z"]), ()),
        ({"architectures": ["BertModel"]}, {}, "classifier", "SEQ_CLS", {},
         (CLASSIFIER, LABELS), ()),
        ({"architectures": [CLASSIFIER], "id2label": {"0": "x", "1": "y"}},
         {"classifier.weight": np.ones((2, 4), np.float32)}, "classifier", "SEQ_CLS", {},
         (CLASSIFIER, LABELS), ()),
        # A tensor that no model of this class has.
        ({"architectures": [CLASSIFIER]}, {}, "extra", "SEQ_CLS", {}, (CLASSIFIER, None),
         ("the base has no tensor extra.weight: added as the adapter has it; check that "
          f"{CLASSIFIER} uses it",)),
        # A head that nothing is known of.
        ({"architectures": ["MadeModel"]}, {}, "tagger", None, {}, ("MadeModel", None),
         ("tagger.weight added, but no architecture is known for an adapter without a task type: "
          "set architectures in config.json",)),
        (None, {}, "classifier", "SEQ_CLS", {}, None,
         ("the base has no config.json: none was made",)),
    ],
)  # fmt: skip
def test_heads_and_their_labels(
    tmp_path: Path, make_bundle: Any, tensors_of: Any, config: Any, more: Any, saved: str,
    task_type: str | None, options: dict[str, Any], expected: Any, notes: tuple[str, ...],
) -> None:  # fmt: skip
    base = make_checkpoint(tmp_path / "base", more, config)
    head = {f"{saved}.weight": np.full((3, 4), 2, np.float32)}
    modules = ["bert.layer.0.query"] if not more else ["layer.0.query"]
    bundle = make_bundle(base, modules, saved=head, task_type=task_type)
    # An adapter without a head does not say what task the model is for.
    other = make_bundle(base, modules, task_type="FEATURE_EXTRACTION", numpy_seed=1)
    report = ff.merge_checkpoint(base, [other, bundle], tmp_path / "out", **options)
    np.testing.assert_array_equal(tensors_of(tmp_path / "out")[f"{saved}.weight"], 2)
    assert report.notes == notes
    if expected is None:
        assert not (tmp_path / "out/config.json").exists()
        with pytest.raises(UsageError, match=r"no config\.json"):
            ff.merge_checkpoint(base, bundle, tmp_path / "again", labels=["x", "y", "z"])
        return
    written = json.loads((tmp_path / "out/config.json").read_text())
    labels = [*written["id2label"].values()] if "id2label" in written else None
    assert ([*written["architectures"]], labels) == ([expected[0]], expected[1])
    if labels:
        assert written["label2id"] == {label: number for number, label in enumerate(labels)}


def test_a_head_takes_the_dtype_of_the_base(
    tmp_path: Path, make_bundle: Any, tensors_of: Any
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({k: v.astype(np.float16) for k, v in QUERY.items()}, base / "model.safetensors")
    saved = {"classifier.weight": np.full((3, 4), 1 / 3, np.float32)}
    bundle = make_bundle(base, ["bert.layer.0.query"], saved=saved, task_type="SEQ_CLS")
    ff.merge_checkpoint(base, bundle, tmp_path / "out")
    found = tensors_of(tmp_path / "out")["classifier.weight"]
    np.testing.assert_array_equal(found, np.full((3, 4), 1 / 3, np.float16))
    bfloat16 = ff.merge_checkpoint(base, bundle, tmp_path / "bf16", dtype="bfloat16")
    assert {v.dtype for v in tensors_of(bfloat16.out).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_norms_with_their_old_names_are_replaced_not_doubled(
    tmp_path: Path, make_bundle: Any, tensors_of: Any
) -> None:
    norms = {f"layer.0.LayerNorm.{name}": np.ones(6, np.float32) for name in ("gamma", "beta")}
    base = make_checkpoint(tmp_path / "base", norms, None)
    saved = {"bert.layer.0.LayerNorm.bias": np.full(6, 7, np.float32)}
    bundle = make_bundle(base, ["bert.layer.0.query"], saved=saved)
    report = ff.merge_checkpoint(base, bundle, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == {*QUERY, *norms}
    np.testing.assert_array_equal(found["layer.0.LayerNorm.beta"], np.full(6, 7))
    assert (report.replaced, report.added) == (("layer.0.LayerNorm.beta",), ())
