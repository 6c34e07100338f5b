"""The shared fixtures are what they say: real files, real models, offline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

TASKS = {"sst2": "dev", "rte": "dev", "cola": "dev", "subj": "test", "mpqa": "test", "trec": "test"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "held out"])
def test_text_slices_have_200_labelled_rows(data_dir: Path, task: str, split: str) -> None:
    name = "train" if split == "train" else TASKS[task]
    header, *rows = (data_dir / "text" / task / f"{name}.tsv").read_text("utf-8").splitlines()
    columns = header.split("\t")
    assert columns in (["text", "label"], ["text_a", "text_b", "label"])
    assert len(rows) == 200
    assert all(len(row.split("\t")) == len(columns) for row in rows)
    assert {int(row.split("\t")[-1]) for row in rows} == set(range(6 if task == "trec" else 2))


def test_published_configs_are_fourierft(published_dir: Path) -> None:
    configs = [json.loads(path.read_text("utf-8")) for path in sorted(published_dir.iterdir())]
    assert [c["peft_type"] for c in configs] == ["FOURIERFT"] * 3
    assert sorted(len(c["target_modules"]) for c in configs) == [2, 2, 11]


def test_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_stories_tokens_are_likely_text(stories260k: Path, stories_tokens: np.ndarray) -> None:
    """The trained model predicts its own language: far below the log(512) = 6.2 of noise."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(stories260k).eval()
    tokens = torch.from_numpy(stories_tokens)
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss < 2.5


def test_random_adapter_is_what_peft_saves(peft_minilm_adapter: Callable[..., Path]) -> None:
    directory = peft_minilm_adapter()
    assert peft_minilm_adapter() is directory
    tensors = load_file(directory / "adapter_model.safetensors")
    spectra = {k: v for k, v in tensors.items() if k.endswith(".fourierft_spectrum")}
    assert len(spectra) == 12
    assert {v.shape for v in spectra.values()} == {(1000,)}
    assert tensors["base_model.model.classifier.weight"].shape == (2, 384)
    assert 0.9 < np.concatenate(list(spectra.values())).std() < 1.1


def test_trained_adapter_learned(
    trained_minilm_adapter: Path,
    load_peft_minilm: Callable[[Path], Any],
    tokenize: Callable[..., dict[str, Any]],
    sst2_rows: list[tuple[str, int]],
) -> None:
    import torch

    model = load_peft_minilm(trained_minilm_adapter)
    with torch.no_grad():
        logits = model(**tokenize([text for text, _ in sst2_rows])).logits
    labels = torch.tensor([label for _, label in sst2_rows])
    assert (logits.argmax(-1) == labels).float().mean().item() > 0.75


def test_tiny_models_and_their_adapters(
    tiny_base: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tiny_bundle: Callable[..., Path],
    load_peft: Callable[..., Any],
    run_verb: Callable[..., Any],
) -> None:
    fields = {"target_modules": ["q_proj"], "n_frequency": 30}
    adapter = tiny_adapter("llama", **fields)
    assert tiny_adapter("llama", **fields) is adapter
    spectra = load_file(adapter / "adapter_model.safetensors")
    assert {v.shape for v in spectra.values()} == {(30,)}
    assert len(spectra) == 2
    assert load_peft(tiny_base("llama"), adapter).peft_config["default"].n_frequency == 30
    code, found, err = run_verb("inspect", tiny_bundle("llama", **fields))
    assert (code, found["inspect"]["coefficients"], err) == (0, 60, "")
    assert run_verb("inspect", adapter / "absent").code == 6
