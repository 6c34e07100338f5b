"""One training of one method: what a process of the comparison does."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from data import Rows
from methods import METHODS

EPOCHS, BATCH_SIZE, MAX_LENGTH = 3, 32, 64
PEER_SETTINGS: dict[str, Any] = {"schedule": "linear", "average": 0.0}  # as Trainer's own


@dataclass(frozen=True)
class Cell:
    """A training: its results are kept under these five values.

    Attributes:
        part: "search" (split of the training rows) or "final" (all of them, test rows scored).
        rate: peak learning rate; None for the toolkit's default.
    """

    task: str
    method: str
    part: str
    seed: int
    rate: float | None

    @property
    def key(self) -> str:
        return f"{self.task}/{self.method}/{self.part}/{self.seed}/{self.rate}"


def train_cell(cell: Cell, rows: Rows, model: str, dtype: str) -> dict[str, Any]:
    """Train, then score the last adapter, so that nothing is chosen on the rows scored."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    search = cell.part == "search"
    parts = (rows.search_train, rows.search_score) if search else (rows.train, rows.test)
    settings = make_settings(cell, dtype)
    task = make_task(model, *parts, settings)
    train = train_ours if METHODS[cell.method].put is None else train_peer
    scored, task = task.eval_dataset, replace(task, eval_dataset=None)
    found = train(task, cell, settings)
    return asdict(cell) | found | score(task, scored, dtype) | {"key": cell.key}


def make_settings(cell: Cell, dtype: str) -> Any:
    """The toolkit's defaults, but for what the comparison fixes for every method."""
    import fourierft_export as ff

    falls = {} if METHODS[cell.method].put is None else PEER_SETTINGS
    return ff.TrainSettings(
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        seed=cell.seed,
        dropout=METHODS[cell.method].dropout,
        dtype=dtype,
        device="cpu",
        eval_share=0.0,
        **METHODS[cell.method].settings,
        **falls,
    )


def make_task(model: str, learnt: Path, scored: Path, settings: Any) -> Any:
    """The model with its head and the rows of both files."""
    from fourierft_export.train.data.make_task import prepare
    from fourierft_export.train.settings import DataSettings

    data = DataSettings(task="text-classification", model=model, data=str(learnt), eval=str(scored))
    task = prepare(data, settings)
    read_first_token_only(task.model)
    return task


def read_first_token_only(model: Any) -> None:
    """Compute the last block for the first token alone: the head of BERT reads no other.

    The outputs are the same but for rounding, and a step takes an eighth less.
    """
    import torch.nn.functional as F

    block = model.bert.encoder.layer[-1]
    attention = block.attention.self

    def forward(hidden: Any, mask: Any = None, *_more: Any, **_others: Any) -> Any:
        def heads(x: Any) -> Any:
            return x.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)

        first = hidden[:, :1]
        mixed = F.scaled_dot_product_attention(
            heads(attention.query(first)),
            heads(attention.key(hidden)),
            heads(attention.value(hidden)),
            attn_mask=None if mask is None else mask[..., :1, :],
            dropout_p=attention.dropout.p if attention.training else 0.0,
        )
        mixed = block.attention.output(mixed.transpose(1, 2).flatten(2), first)
        return block.feed_forward_chunk(mixed)

    block.forward = forward


def score(task: Any, rows: Any, dtype: str) -> dict[str, Any]:
    """Accuracy, mean loss, and which rows were right: bits in the file's order, as hexadecimal."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    task.model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    right, losses = np.zeros(len(rows), bool), []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.no_grad(), autocast:
        for start in range(0, len(rows), BATCH_SIZE):
            numbers = order[start : start + BATCH_SIZE]
            batch = dict(task.data_collator([rows[i] for i in numbers]))
            labels = batch.pop("labels")
            logits = task.model(**batch).logits.float()
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            right[numbers] = (logits.argmax(-1) == labels).numpy()
    return {
        "score": float(right.mean()),
        "loss": float(np.mean(losses)),
        "scored": len(rows),
        "right": np.packbits(right).tobytes().hex(),
    }


def train_ours(task: Any, cell: Cell, settings: Any) -> dict[str, Any]:
    """The toolkit's own `train_adapter`."""
    import fourierft_export as ff

    del cell
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter.fourierft.safetensors"
        report = ff.train_adapter(task, out, settings, picture=False)
    heads = sum(
        p.numel()
        for name, p in task.model.named_parameters()
        if p.requires_grad and any(head in name for head in task.modules_to_save)
    )
    return {
        "parameters": sum(report.parameters.values()) - heads,
        "head_parameters": heads,
        "bytes": report.bundle_bytes,
        "seconds_per_step": report.seconds_per_step,
    }


def train_peer(task: Any, cell: Cell, settings: Any) -> dict[str, Any]:
    """The same Trainer and batches around a model that PEFT prepared; its rate falls to zero."""
    import torch
    from transformers import TrainerCallback

    from fourierft_export.train import defaults
    from fourierft_export.train.train import make_arguments, resolved
    from fourierft_export.train.trainer import AdapterTrainer
    from fourierft_export.train.training_run import plan

    class Clock(TrainerCallback):
        """Keeps the seconds of every step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_args: Any, **_others: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_args: Any, **_others: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    method = METHODS[cell.method]
    assert method.put is not None
    torch.manual_seed(cell.seed)
    heads = task.modules_to_save
    model = method.put(task)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in learning.items() if any(part in name for part in heads)]
    body = [p for name, p in learning.items() if not any(part in name for part in heads)]
    head_rate = cell.rate if method.is_head_rate else defaults.HEAD_LEARNING_RATE
    groups = [{"params": head, "lr": head_rate}]
    groups += [{"params": body, "lr": cell.rate}] if body else []
    settings, clock = resolved(settings), Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = make_arguments(settings, Path(folder))
        arguments.save_strategy = "no"
        batches = plan(task, settings, arguments)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        trainer = AdapterTrainer(
            replace(task, model=model), settings, batches, arguments, [clock], optimizer=optimizer
        )
        trainer.train()
    return {
        "parameters": sum(p.numel() for p in body),
        "head_parameters": sum(p.numel() for p in head),
        "bytes": _file_bytes(model, learning),
        "seconds_per_step": median(clock.seconds[3:]),
    }


def _file_bytes(model: Any, learning: dict[str, Any]) -> int:
    """What the method's own files take: PEFT's folder without its README, or the head alone."""
    if not hasattr(model, "peft_config"):
        return sum(p.numel() * p.element_size() for p in learning.values())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kept = ("adapter_model.safetensors", "adapter_config.json")
        return sum((Path(folder) / name).stat().st_size for name in kept)
