"""Every task from a Hugging Face directory: merged, exported and validated against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fourierft_export as ff
from fourierft_export.errors import BadInputError, UsageError
from fourierft_export.models.task import auto_class_for, get_task
from fourierft_export.onnx_graph.report import ExportReport
from fourierft_export.onnx_graph.trace.pretrained import export_pretrained
from fourierft_export.proof.validate import validate

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]

SMALL = {"vocab_size": 90, "max_position_embeddings": 64}
BERT = SMALL | {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
DISTILBERT = SMALL | {"dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 40}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}
T5 = {"vocab_size": 90, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 1, "num_heads": 2}
BART = SMALL | {
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}


@dataclass(frozen=True)
class Case:
    """A base directory, an adapter that PEFT makes on a task model of it, and what is exported.

    Attributes:
        saved_as: class whose weights the base directory holds.
        fields: of its config.
        task, task_type: what the adapter is for.
        options: of the adapter.
        outputs: the graph's, with their shapes.
        layers: how many adapted layers are in the graph.
        num_labels: of the head.
        inputs: the graph's.
        note: how the report's one note begins.
        modes: of the exports.
    """

    saved_as: str
    fields: dict[str, Any]
    task: str
    task_type: str | None
    options: dict[str, Any]
    outputs: dict[str, tuple[int | str, ...]]
    layers: int = 2
    num_labels: int | None = None
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    note: str | None = None
    modes: tuple[str, ...] = ("unmerged",)


TOKENS = ("batch", "sequence")
CASES = {
    "tokens": Case(
        "BertModel",
        BERT,
        "token-classification",
        "TOKEN_CLS",
        {"target_modules": ["query", "value"]},
        {"logits": (*TOKENS, 5)},
        num_labels=5,
        inputs=("input_ids", "attention_mask", "token_type_ids"),
    ),
    "answers": Case(
        "DistilBertModel",
        DISTILBERT,
        "question-answering",
        "QUESTION_ANS",
        {"target_modules": ["q_lin", "v_lin"]},
        {"start_logits": TOKENS, "end_logits": TOKENS},
    ),
    "images": Case(
        "ViTForImageClassification",
        VIT,
        "image-classification",
        None,
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
        {"logits": ("batch", 5)},
        num_labels=5,
        inputs=("pixel_values",),
        modes=("merged", "unmerged"),
    ),
    "CLIP's images": Case(
        "CLIPVisionModel",
        VIT,
        "feature-extraction",
        None,
        {"target_modules": ["q_proj", "v_proj"]},
        {"last_hidden_state": ("batch", 5, 24), "pooler_output": ("batch", 24)},
        inputs=("pixel_values",),
    ),
    "CLIP's texts": Case(
        "CLIPTextModel",
        BERT,
        "feature-extraction",
        None,
        {"target_modules": ["q_proj", "v_proj"]},
        {"last_hidden_state": (*TOKENS, 24), "pooler_output": ("batch", 24)},
    ),
    "an encoder published without a pooler": Case(
        "RobertaForMaskedLM",
        BERT | {"type_vocab_size": 1},
        "feature-extraction",
        "FEATURE_EXTRACTION",
        {"target_modules": ["query", "value"]},
        {"last_hidden_state": (*TOKENS, 24)},
    ),
    "experts": Case(
        "MixtralForCausalLM",
        BERT | {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2},
        "text-generation",
        "CAUSAL_LM",
        {"target_modules": ["q_proj", "v_proj"]},
        {"logits": (*TOKENS, 90)},
    ),
    "T5's encoder": Case(
        "T5ForConditionalGeneration",
        T5,
        "seq2seq-encoder",
        "SEQ_2_SEQ_LM",
        {"target_modules": ["q", "v"]},
        {"last_hidden_state": (*TOKENS, 24)},
        note="4 adapted layers are outside the encoder",
    ),
    "an encoder alone": Case(
        "T5EncoderModel",
        T5,
        "seq2seq-encoder",
        None,
        {"target_modules": ["q", "wo"]},
        {"last_hidden_state": (*TOKENS, 24)},
    ),
    "BART's encoder": Case(
        "BartForConditionalGeneration",
        BART,
        "seq2seq-encoder",
        "SEQ_2_SEQ_LM",
        {"target_modules": ["q_proj", "fc1"]},
        {"last_hidden_state": (*TOKENS, 24)},
        note="3 adapted layers are outside the encoder",
    ),
}


@dataclass(frozen=True)
class Made:
    """A case's files, PEFT's model of it, and what was exported, by mode."""

    case: Case
    base: Path
    adapter: Path
    bundle: ff.Bundle
    peft: Any
    exports: dict[str, ExportReport]


@pytest.fixture(params=CASES, scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    import peft
    import transformers

    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("task")
    torch.manual_seed(0)
    cls = getattr(transformers, case.saved_as)
    cls(cls.config_class(**case.fields)).save_pretrained(folder / "base")
    auto = auto_class_for({"architectures": [case.saved_as]}, get_task(case.task))
    labels = {} if case.num_labels is None else {"num_labels": case.num_labels}
    model = getattr(transformers, auto).from_pretrained(folder / "base", **labels)
    options = case.options | {"n_frequency": 60, "scaling": 20.0, "task_type": case.task_type}
    model = peft.get_peft_model(model, peft.FourierFTConfig(**options)).eval()
    model.save_pretrained(folder / "adapter")
    bundle = ff.from_peft(folder / "adapter", folder / "base")
    exports = {
        mode: export_pretrained(folder / "base", bundle, folder / f"{mode}.onnx", mode=mode)
        for mode in case.modes
    }
    return Made(case, folder / "base", folder / "adapter", bundle, model, exports)


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """Three rows; of text, the second is padded."""
    random = torch.Generator().manual_seed(1)
    if case.inputs == ("pixel_values",):
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=random)}
    ids = torch.randint(1, 90, (3, 9), generator=random)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 40).long()}
    return {name: every[name] for name in case.inputs}


def test_exports_equal_peft(made: Made, run: Run) -> None:
    case, inputs = made.case, inputs_of(made.case)
    model = made.peft.get_encoder() if case.task == "seq2seq-encoder" else made.peft
    with torch.no_grad():
        want = model(**inputs)
        with made.peft.disable_adapter():
            base = model(**inputs)
    for report in made.exports.values():
        assert tuple(report.inputs) == case.inputs
        assert report.outputs == case.outputs
        assert len(report.layers) == case.layers
        assert len(report.notes) == (case.note is not None)
        assert all(note.startswith(str(case.note)) for note in report.notes)
        found = run(Path(report.path), inputs)
        assert list(found) == list(case.outputs)
        for name, got in found.items():
            exact = want[name].numpy()
            assert got.shape == exact.shape
            np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
            np.testing.assert_array_equal(got.argmax(-1), exact.argmax(-1))
            assert np.abs(base[name].numpy() - got).max() > 1e-2 * np.abs(exact).max()


def test_merged_checkpoints_and_graphs_are_validated(made: Made, tmp_path: Path) -> None:
    ff.merge_checkpoint(made.base, made.bundle, tmp_path / "merged")
    files = [report.path for report in made.exports.values()]
    images = made.case.inputs == ("pixel_values",)
    arrays = {name: value.numpy() for name, value in inputs_of(made.case).items()}
    report = validate(
        base=made.base,
        bundle=made.bundle,
        peft=made.adapter,
        merged=tmp_path / "merged",
        onnx=files,
        inputs=arrays if images else None,
        samples=None if images else 12,
        threads=1,
    )
    assert report.task == made.case.task
    assert report.ok, report.problems
    compared = {name for pair in report.comparisons for name in (pair.left, pair.right)}
    assert {"torch", "peft", "merged", *(f"onnx:{mode}.onnx" for mode in made.exports)} <= compared
    if images:
        with pytest.raises(UsageError, match=r"pixel_values|--inputs"):
            validate(base=made.base, bundle=made.bundle, onnx=files)


def test_outputs_that_do_not_matter_are_left_out(tmp_path: Path, run: Run) -> None:
    from transformers import BartConfig, BartForSequenceClassification

    torch.manual_seed(0)
    model = BartForSequenceClassification(BartConfig(**BART, num_labels=3, eos_token_id=2)).eval()
    model.save_pretrained(tmp_path / "base")
    ff.inject(model, ff.FourierFTConfig(target_modules=["q_proj"], n_frequency=60, scaling=20.0))
    path = tmp_path / "model.onnx"
    report = export_pretrained(tmp_path / "base", ff.capture(model), path)
    assert report.outputs == {"logits": ("batch", 3)}
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        found = model(**inputs)
    want = found.logits.numpy()
    assert found.encoder_last_hidden_state is not None
    np.testing.assert_allclose(
        run(path, inputs)["logits"], want, rtol=0, atol=1e-4 * np.abs(want).max()
    )


REFUSED = {
    "LlamaForSequenceClassification": ("q_proj", "SEQ_CLS", "no padding token is defined"),
    "CLIPModel": ("q_proj", None, "input_ids, attention_mask.* also takes pixel_values"),
    "BertForMultipleChoice": ("query", "SEQ_CLS", "architecture BertForMultipleChoice"),
    "Wav2Vec2Model": ("q_proj", "FEATURE_EXTRACTION", "text or images, found input_values"),
    "GPT2LMHeadModel": ("c_attn", "SEQ_2_SEQ_LM", "transformers loads for seq2seq-encoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_exported(name: str, tmp_path: Path) -> None:
    """The error says what is missing; nothing is exported as another task."""
    import transformers

    target, task_type, why = REFUSED[name]
    cls = getattr(transformers, name)
    parts = {"text_config": BERT, "vision_config": VIT} if name == "CLIPModel" else {}
    sound = {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,)}
    sound |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    fields = sound | BERT if name == "Wav2Vec2Model" else BERT
    model = cls(cls.config_class(**(parts or fields)))
    model.save_pretrained(tmp_path / "base")
    ff.inject(model, ff.FourierFTConfig(target_modules=[target], n_frequency=20))
    bundle = ff.capture(model)
    bundle = replace(bundle, spec=replace(bundle.spec, task_type=task_type))
    with pytest.raises((UsageError, BadInputError), match=why):
        export_pretrained(tmp_path / "base", bundle, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
