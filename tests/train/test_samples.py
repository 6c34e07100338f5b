"""The samples of training run and do what they say."""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from fourierft_export import Bundle

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    names = ("data", "methods", "cells", "table")
    monkeypatch.syspath_prepend(str(SAMPLES / "quality"))
    threads = torch.get_num_threads()
    yield {name: importlib.import_module(name) for name in names}
    torch.set_num_threads(threads)  # a training takes one
    for name in names:
        sys.modules.pop(name, None)


def test_rows_are_drawn_once_and_split(
    sample: dict[str, ModuleType], data_dir: Path, tmp_path: Path
) -> None:
    draw = sample["data"].write_rows
    rows = draw(data_dir / "text", "trec", tmp_path, rows=50, scored=30)
    lines = {
        name: getattr(rows, name).read_text("utf-8").splitlines()[1:]
        for name in ("search_train", "search_score", "train", "test")
    }
    assert [len(part) for part in lines.values()] == [40, 10, 50, 30]
    assert sorted(lines["search_train"] + lines["search_score"]) == sorted(lines["train"])
    known = (data_dir / "text/trec/train.tsv").read_text("utf-8").splitlines()
    assert set(lines["train"]) <= set(known)
    again = draw(data_dir / "text", "trec", tmp_path / "again", rows=50, scored=30)
    assert again.train.read_bytes() == rows.train.read_bytes()


def test_one_training_of_each_kind_and_the_table(
    sample: dict[str, ModuleType], data_dir: Path, minilm_dir: Path, tmp_path: Path
) -> None:
    rows = sample["data"].write_rows(data_dir / "text", "sst2", tmp_path, rows=40, scored=16)
    methods = {"head": 0.01, "lora": 0.002, "peft": 0.1, "ours": None}
    found = {}
    for method, rate in methods.items():
        cell = sample["cells"].Cell("sst2", method, "final", 0, rate)
        result = sample["cells"].train_cell(cell, rows, str(minilm_dir), "float32")
        found[cell.key] = result
        assert 0 <= result["score"] <= 1
    by_method = {result["method"]: result for result in found.values()}
    assert {m: r["parameters"] for m, r in by_method.items()} == {
        "head": 0,
        "lora": 12 * 8 * 2 * 384,
        "peft": 12_000,
        "ours": 12_000,
    }
    assert {r["head_parameters"] for r in by_method.values()} == {2 * 384 + 2}
    assert by_method["ours"]["bytes"] < by_method["peft"]["bytes"] < by_method["lora"]["bytes"]
    text = sample["table"].markdown(found, ["sst2"], list(methods))
    assert text.count("\n| ") == len(methods)
    assert "LoRA r=8 (PEFT): sst2 0.002" in text
    sample["table"].draw(found, ["sst2"], list(methods), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_digits_learn_to_be_read_when_rotated(tmp_path: Path) -> None:
    out = tmp_path / "rotated.fourierft.safetensors"
    command = ["-m", "fourierft_export", "train", "--module", "digits_task:rotated", "--json"]
    command += ["--threads", "1", "--epochs", "2", "-o", str(out)]
    done = subprocess.run(
        [sys.executable, *command], cwd=SAMPLES, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["train"]
    assert report["before"]["accuracy"] < 0.3
    assert report["best"]["accuracy"] > 0.6
    assert len(Bundle.load(out).layers) == 25


@pytest.fixture
def small_encoder(minilm_dir: Path, tmp_path: Path) -> Path:
    """A BERT of two layers with MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    folder = tmp_path / "model"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_trains_saves_and_goes_on(small_encoder: Path, data_dir: Path, tmp_path: Path) -> None:
    for part, rows in (("train", 64), ("dev", 40)):
        lines = (data_dir / "text" / "sst2" / f"{part}.tsv").read_text("utf-8").splitlines()
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines[: rows + 1]), "utf-8")
    main = runpy.run_path(str(SAMPLES / "train_trainer.py"))["main"]
    out = tmp_path / "out"
    results = main(str(small_encoder), tmp_path, out)
    assert results["accuracy of the bundle"] == results["accuracy of the best"]
    bundle = Bundle.load(out / "adapter.fourierft.safetensors")
    assert [layer.shape for layer in bundle.layers] == [(32, 32)] * 4
    assert set(bundle.saved) == {"classifier.bias", "classifier.weight"}
    assert results["bytes of the bundle"] < 4 * 1000 * 4 + 2000
    base = (small_encoder / "model.safetensors").stat().st_size
    assert results["bytes of a checkpoint"] < base / 4  # most of it is the tokenizer

    def number(folder: Path) -> int:
        return int(folder.name.split("-")[1])

    _, last = sorted(out.glob("checkpoint-*"), key=number)
    shutil.rmtree(last)  # as if the run had been killed after the one before
    again = main(str(small_encoder), tmp_path, out)
    assert (out / last.name).is_dir()
    again.pop("bytes of a checkpoint")  # trainer_state.json holds timings
    assert again == {key: results[key] for key in again}
    assert Bundle.load(out / "adapter.fourierft.safetensors").to_bytes() == bundle.to_bytes()
