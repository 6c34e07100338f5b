"""The main job on a real model, as a user does it: from a PEFT adapter to proven ONNX files.

Everything goes through the command line; PEFT's own forward is what ONNX Runtime is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForSequenceClassification

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
Verb = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(
    minilm_dir: Path,
    trained_minilm_adapter: Path,
    run_verb: Verb,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What the verbs made of a bare encoder and an adapter that brings the classifier's head."""
    out = tmp_path_factory.mktemp("job")
    assert run_verb("pack", trained_minilm_adapter, "--base", minilm_dir, "-o", out / "a").code == 0
    words = ["--base", minilm_dir, "--bundle", out / "a"]
    assert run_verb("merge", *words, "-o", out / "merged").code == 0
    for mode in ("merged", "unmerged"):
        assert run_verb("export", *words, "--mode", mode, "-o", out / f"{mode}.onnx").code == 0
    return out


@pytest.fixture(scope="module")
def inputs(tokenize: Callable[..., Any], sst2_sentences: list[str]) -> dict[str, Any]:
    return tokenize(sst2_sentences[:64])


@pytest.fixture(scope="module")
def expected(
    inputs: dict[str, Any], load_peft_minilm: Callable[[Path], Any], trained_minilm_adapter: Path
) -> Any:
    """PEFT's logits of `inputs`."""
    with torch.no_grad():
        return load_peft_minilm(trained_minilm_adapter)(**inputs).logits


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_peft_and_onnx_runtime_give_the_same_logits(
    mode: str, folder: Path, inputs: dict[str, Any], expected: Any
) -> None:
    session = onnxruntime.InferenceSession(folder / f"{mode}.onnx")
    assert {value.name for value in session.get_inputs()} == set(INPUTS)
    found = np.asarray(session.run(["logits"], {n: inputs[n].numpy() for n in INPUTS})[0])
    assert np.abs(found - expected.numpy()).max() < 1e-4
    assert (found.argmax(-1) == expected.numpy().argmax(-1)).all()


def test_the_merged_checkpoint_loads_with_nothing_missing(
    folder: Path, inputs: dict[str, Any], expected: Any
) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_the_merged_graph_has_the_nodes_of_the_base(
    folder: Path, minilm_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(minilm_dir, num_labels=2).eval()
    ids = torch.arange(32).reshape(2, 16) + 100
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        model,
        (),
        tmp_path / "base.onnx",
        kwargs=dict(zip(INPUTS, (ids, torch.ones_like(ids), ids * 0), strict=True)),
        input_names=INPUTS,
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(INPUTS, axes),
        verbose=False,
    )
    base, merged = (
        [(node.op_type, node.domain) for node in onnx.load(path).graph.node]
        for path in (tmp_path / "base.onnx", folder / "merged.onnx")
    )
    assert merged == base


def test_validate_proves_it(
    folder: Path, minilm_dir: Path, trained_minilm_adapter: Path, run_verb: Verb
) -> None:
    words = ["validate", "--base", minilm_dir, "--bundle", folder / "a"]
    words += ["--peft", trained_minilm_adapter, "--merged", folder / "merged"]
    words += ["--onnx", folder / "merged.onnx", "--onnx", folder / "unmerged.onnx"]
    report = run_verb(*words, "--report", folder / "report.html").json["validate"]
    sides = ["base", "torch", "peft", "merged", "onnx:merged.onnx", "onnx:unmerged.onnx"]
    assert report["ok"] and [side["name"] for side in report["sides"]] == sides
    assert "</html>" in (folder / "report.html").read_text("utf-8")
