"""samples/train_trainer.py does what it says, and goes on where it was stopped."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from fourierft_export import Bundle

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "train_trainer.py"


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
    main = runpy.run_path(str(SAMPLE))["main"]
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
