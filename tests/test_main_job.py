"""The main job on a real model, as a user does it: from a PEFT adapter to proven ONNX files.

Everything goes through the command line; PEFT's own forward is what ONNX Runtime is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from fourierft_export.cli.main import run

if TYPE_CHECKING:
    from peft import PeftModel

SENTENCES = 64


class Job(NamedTuple):
    """What the verbs made of one adapter over one base."""

    base: Path
    adapter: Path
    bundle: Path
    merged: Path
    onnx_merged: Path
    onnx_unmerged: Path


@pytest.fixture(scope="module")
def job(
    minilm_dir: Path, trained_minilm_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    """A bare encoder, and a trained adapter that brings the classifier's head."""
    base, adapter = minilm_dir, trained_minilm_adapter
    out = tmp_path_factory.mktemp("job")
    made = Job(
        base,
        adapter,
        out / "a.fourierft.safetensors",
        out / "merged",
        out / "merged.onnx",
        out / "unmerged.onnx",
    )
    assert do("pack", adapter, "--base", base, "-o", made.bundle) == 0
    assert do("merge", "--base", base, "--bundle", made.bundle, "-o", made.merged) == 0
    for mode, file in (("merged", made.onnx_merged), ("unmerged", made.onnx_unmerged)):
        words = ("--base", base, "--bundle", made.bundle, "--mode", mode, "-o", file)
        assert do("export", *words) == 0
    return made


def do(*words: object) -> int:
    return run([str(word) for word in words])


def base_model_of(job: Job) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=2).eval()


def peft_model_of(job: Job) -> PeftModel:
    from peft import PeftModel

    return PeftModel.from_pretrained(base_model_of(job), job.adapter).eval()


def run_onnx(path: Path, inputs: dict[str, Any]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    assert names == {"input_ids", "attention_mask", "token_type_ids"}
    return np.asarray(session.run(["logits"], {name: inputs[name].numpy() for name in names})[0])


def test_peft_and_onnx_runtime_give_the_same_logits(
    job: Job, tokenize: Callable[..., dict[str, Any]], sst2_sentences: list[str]
) -> None:
    import torch

    inputs = tokenize(sst2_sentences[:SENTENCES])
    with torch.no_grad():
        expected = peft_model_of(job)(**inputs).logits.numpy()
        base = base_model_of(job)(**inputs).logits.numpy()
    for file in (job.onnx_merged, job.onnx_unmerged):
        found = run_onnx(file, inputs)
        assert np.abs(found - expected).max() < 1e-4
        assert (found.argmax(-1) == expected.argmax(-1)).all()
        assert np.abs(found - base).max() > 1e-2


def test_the_merged_checkpoint_loads_with_nothing_missing(
    job: Job, tokenize: Callable[..., dict[str, Any]], sst2_sentences: list[str]
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    merged, info = AutoModelForSequenceClassification.from_pretrained(
        job.merged, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    inputs = tokenize(sst2_sentences[:SENTENCES])
    with torch.no_grad():
        expected = peft_model_of(job)(**inputs).logits
        found = merged.eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_merged_graph_has_the_nodes_of_the_base(job: Job, tmp_path: Path) -> None:
    import onnx
    import torch

    model = base_model_of(job)
    ids = torch.arange(32).reshape(2, 16) + 100
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
    torch.onnx.export(
        model,
        (),
        tmp_path / "base.onnx",
        kwargs=inputs,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(names, axes),
        dynamo=True,
        verbose=False,
    )
    graphs = [onnx.load(tmp_path / "base.onnx").graph, onnx.load(job.onnx_merged).graph]
    base, merged = ([(node.op_type, node.domain) for node in graph.node] for graph in graphs)
    assert merged == base


def test_validate_proves_it(job: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    words: list[object] = ["validate", "--base", job.base, "--bundle", job.bundle]
    words += ["--peft", job.adapter, "--merged", job.merged]
    words += ["--onnx", job.onnx_merged, "--onnx", job.onnx_unmerged]
    capsys.readouterr()
    assert do(*words, "--json", "--report", page) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    sides = {side["name"] for side in report["validate"]["sides"]}
    assert {"base", "torch", "peft", "merged"} < sides
    assert "</html>" in page.read_text("utf-8")
