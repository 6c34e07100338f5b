"""One training of one method: what a process of the comparison does."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from data import Rows
from methods import METHODS, N_FREQUENCY, TARGETS

EPOCHS, BATCH_SIZE, MAX_LENGTH = 3, 32, 64
SCORED_AT_A_TIME = 64


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
    """Train and score; the last adapter counts, so that nothing is chosen on the rows scored."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    from fourierft_export.train.data.prepare import prepare

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    search = cell.part == "search"
    task = prepare(
        "text-classification",
        model=model,
        data=rows.search_train if search else rows.train,
        eval_data=rows.search_score if search else rows.test,
        max_length=MAX_LENGTH,
        seed=cell.seed,
    )
    found = (
        _ours(task, cell, dtype) if METHODS[cell.method].put is None else _peer(task, cell, dtype)
    )
    return asdict(cell) | found | {"key": cell.key}


def _ours(task: Any, cell: Cell, dtype: str) -> dict[str, Any]:
    from fourierft_export.train.settings import TrainSettings
    from fourierft_export.train.train import train_adapter

    steps = math.ceil(len(task.train) / BATCH_SIZE) * EPOCHS
    settings = TrainSettings(
        n_frequency=N_FREQUENCY,
        target_modules=TARGETS,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        seed=cell.seed,
        learning_rate=cell.rate,
        dtype=dtype,
        eval_every=steps,
        keep="last",
    )
    with tempfile.TemporaryDirectory() as folder:
        report = train_adapter(task, Path(folder) / "adapter.fourierft.safetensors", settings)
    return {
        "score": report.best["accuracy"],
        "loss": report.best["loss"],
        "parameters": report.parameters["spectra"],
        "head_parameters": report.parameters["heads"],
        "bytes": report.bundle_bytes,
        "seconds_per_step": report.seconds_per_step,
    }


def _peer(task: Any, cell: Cell, dtype: str) -> dict[str, Any]:
    """The same loop, step for step, around a model that PEFT prepared."""
    import torch

    from fourierft_export.train import defaults
    from fourierft_export.train.evaluate import evaluate
    from fourierft_export.train.order import epoch_batches
    from fourierft_export.train.precision import Precision
    from fourierft_export.train.processes import join
    from fourierft_export.train.schedule import rate_factor
    from fourierft_export.train.step import Learner

    method = METHODS[cell.method]
    torch.manual_seed(cell.seed)
    heads = task.modules_to_save
    model = method.put(task)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in learning.items() if any(part in name for part in heads)]
    body = [p for name, p in learning.items() if not any(part in name for part in heads)]
    head_rate = cell.rate if method.is_head_rate else defaults.HEAD_LEARNING_RATE
    peaks = [head_rate, cell.rate]
    groups = [{"params": head}, {"params": body}] if body else [{"params": head}]
    processes, precision = join("cpu"), Precision(dtype, torch.device("cpu"))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    learner = Learner(
        model=model,
        task=task,
        optimizer=optimizer,
        learning=learning,
        processes=processes,
        precision=precision,
        accumulate=1,
        max_grad_norm=defaults.MAX_GRAD_NORM,
        seed=cell.seed,
    )
    batches = [
        batch
        for epoch in range(EPOCHS)
        for batch in epoch_batches(
            len(task.train), BATCH_SIZE, seed=cell.seed, epoch=epoch, lengths=task.lengths
        )
    ]
    seconds = []
    for step, batch in enumerate(batches):
        factor = rate_factor(step, len(batches), warmup=defaults.WARMUP, schedule=defaults.SCHEDULE)
        for group, peak in zip(optimizer.param_groups, peaks, strict=False):
            group["lr"] = peak * factor
        seconds.append(learner.step(step, batch, asked=bool).seconds)
    scores = evaluate(
        model,
        task,
        task.eval,
        batch_size=SCORED_AT_A_TIME,
        processes=processes,
        precision=precision,
    )
    processes.close()
    return {
        "score": scores["accuracy"],
        "loss": scores["loss"],
        "parameters": sum(p.numel() for p in body),
        "head_parameters": sum(p.numel() for p in head),
        "bytes": _file_bytes(model, learning),
        "seconds_per_step": median(seconds[3:]),
    }


def _file_bytes(model: Any, learning: dict[str, Any]) -> int:
    """What the method's own files take: PEFT's folder without its README, or the head alone."""
    if not hasattr(model, "peft_config"):
        return sum(p.numel() * p.element_size() for p in learning.values())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kept = ("adapter_model.safetensors", "adapter_config.json")
        return sum((Path(folder) / name).stat().st_size for name in kept)
